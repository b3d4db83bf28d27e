// Prompts to start from: what the default model was taught, and plain ones for any other.

const BY_MODEL = {
  tintype: [
    "a desert island",
    "three red apples",
    "two balloons on a pink background",
    "a rocket above a globe",
    "a tractor, glossy style",
    "a cactus next to a sun",
    "two cats on a blue background",
  ],
};
const FOR_ANY = [
  "a lighthouse on a cliff at dusk, oil painting",
  "a red bicycle leaning against a white wall, photograph",
  "a bowl of oranges on a wooden table, soft window light",
  "an astronaut riding a horse, watercolour",
];

/** The examples of a model, as the server describes it. */
export function curated(model) {
  return BY_MODEL[model.id] ?? FOR_ANY;
}
