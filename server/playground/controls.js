// The form: what the server offers, as fields; the fields, as a request.

import { curated } from "./examples.js";

const element = (id) => document.getElementById(id);
const SHAPES = [
  ["Square", 1, 1],
  ["Landscape", 1.5, 1],
  ["Portrait", 1, 1.5],
  ["Wide", 2, 1],
  ["Large square", 2, 2],
];
const DEFAULT_STEPS = 20;
const FEW_STEPS = 6;
const FEW_STEP_SOLVERS = ["lcm", "tcd"];
const MAX_COUNT = 4;

export class Controls {
  #models = [];
  #solvers = [];
  /** The picture to start from, as a file; null to start from noise. */
  #start = null;

  constructor(onChange) {
    const form = element("form");
    form.addEventListener("input", () => {
      this.#showValues();
      onChange();
    });
    element("model").addEventListener("change", () => {
      this.#offerModel();
      onChange();
    });
    element("solver").addEventListener("change", () => {
      // A few-step solver at twenty steps, or another one at six, is never what is meant.
      const few = FEW_STEP_SOLVERS.includes(element("solver").value);
      element("steps").value = few ? FEW_STEPS : DEFAULT_STEPS;
      this.#showValues();
      onChange();
    });
    element("reset").addEventListener("click", () => {
      this.#offerModel();
      for (const id of ["seed", "negative"]) element(id).value = "";
      element("count").value = "1";
      this.startFrom(null);
      onChange();
    });
    element("start").addEventListener("change", () => {
      this.startFrom(element("start").files[0] ?? null);
      onChange();
    });
    element("start-remove").addEventListener("click", () => {
      this.startFrom(null);
      element("start").focus();
      onChange();
    });
    element("count").replaceChildren(...range(MAX_COUNT).map((n) => new Option(n, n)));
    // Beside the picture there is room for the settings; above it, on a phone, there is not.
    element("settings").open = matchMedia("(min-width: 56rem)").matches;
  }

  /** Fill the fields from what the server says: models (the default first) and solvers. */
  offer(models, solvers) {
    this.#models = models;
    this.#solvers = solvers;
    element("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
    element("model-field").hidden = models.length < 2;
    this.#offerModel();
  }

  /** What the form asks for; without a seed where its field is empty. */
  request() {
    const seed = element("seed").value.trim();
    const [width, height] = element("size").value.split("x").map(Number);
    return {
      model: element("model").value,
      prompt: element("prompt").value.trim(),
      negative_prompt: element("negative").value.trim(),
      size: element("size").value,
      width,
      height,
      n: Number(element("count").value),
      steps: Number(element("steps").value),
      solver: element("solver").value,
      guidance: Number(element("guidance").value),
      ...(seed === "" ? {} : { seed: Number(seed) }),
      ...(this.#start ? { start: this.#start, strength: Number(element("strength").value) } : {}),
    };
  }

  /** Start from a picture, or with null from noise. */
  startFrom(picture) {
    URL.revokeObjectURL(element("start-preview").src);
    this.#start = picture;
    element("start").value = "";
    element("start-field").hidden = picture !== null;
    element("strength-field").hidden = picture === null;
    if (picture) element("start-preview").src = URL.createObjectURL(picture);
    else element("start-preview").removeAttribute("src");
  }

  /** Put an earlier request back into the form, its seed aside. */
  restore(request) {
    element("model").value = request.model;
    this.#offerModel();
    element("prompt").value = request.prompt;
    element("negative").value = request.negative_prompt;
    for (const name of ["size", "steps", "solver", "guidance"]) element(name).value = request[name];
    element("count").value = request.n;
    this.startFrom(request.start ?? null);
    if (request.start) element("strength").value = request.strength;
    this.#showValues();
  }

  /** What is wrong before the server is asked, as [field, message]; null if nothing. */
  problem() {
    if (element("prompt").value.trim() === "") return ["prompt", "Say what it should draw."];
    const seed = element("seed").value.trim();
    if (seed !== "" && !(/^\d+$/.test(seed) && Number.isSafeInteger(Number(seed))))
      return ["seed", `A seed is a whole number from 0 to ${Number.MAX_SAFE_INTEGER}.`];
    return null;
  }

  /** Mark the field of a problem, and none else; opens the settings where it hides there. */
  mark(name) {
    for (const marked of document.querySelectorAll("[aria-invalid]"))
      marked.removeAttribute("aria-invalid");
    const field = name && element(FIELDS[name] ?? name);
    if (!field?.matches("#form :is(input, select, textarea)")) return;
    if (element("settings").contains(field)) element("settings").open = true;
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }

  #offerModel() {
    const model = this.#models.find(({ id }) => id === element("model").value);
    if (!model) return;
    element("size").replaceChildren(...sizesOf(model));
    element("guidance-field").hidden = !model.guidable;
    element("guidance").value = model.guidance_default;
    const names = this.#solvers.includes(model.solver_default)
      ? this.#solvers
      : [model.solver_default, ...this.#solvers];
    element("solver").replaceChildren(...names.map((name) => new Option(label(name, model), name)));
    element("solver").value = model.solver_default;
    const few = FEW_STEP_SOLVERS.includes(model.solver_default);
    element("steps").value = few ? FEW_STEPS : DEFAULT_STEPS;
    const examples = curated(model);
    element("examples").replaceChildren(...examples.map(chip));
    if (element("prompt").value === "") element("prompt").value = examples[0];
    this.#showValues();
  }

  #showValues() {
    for (const name of ["steps", "guidance", "strength"])
      element(`${name}-value`).textContent = element(name).value;
  }
}

/** Parameters of the API that have another name on the page. */
const FIELDS = {
  negative_prompt: "negative",
  n: "count",
  width_px: "size",
  height_px: "size",
  image: "start",
};

const range = (count) => Array.from({ length: count }, (_, i) => i + 1);

/** A solver's name; a default that stands in for the checkpoint's own scheduler says for which. */
function label(solver, model) {
  const standsIn = model.scheduler_stand_in !== null && solver === model.solver_default;
  return standsIn ? `${solver}, in place of ${model.scheduler_class}` : solver;
}

function chip(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  return button;
}

/** The shapes that fit the model's grid and bounds, as options, each once. */
function sizesOf(model) {
  const grid = model.size_multiple_px;
  const fit = (side) =>
    Math.round(Math.min(model.max_px, Math.max(model.min_px, side)) / grid) * grid;
  const options = new Map();
  for (const [name, wide, high] of SHAPES) {
    const [width, height] = [fit(model.native_px * wide), fit(model.native_px * high)];
    const size = `${width}x${height}`;
    if (!options.has(size)) options.set(size, new Option(`${name}, ${width} × ${height}`, size));
  }
  return [...options.values()];
}
