// The request on the page as text to paste: curl, and Python with the official openai client.

/** The body of POST /v1/images/generations for a request of the page. */
function body(request) {
  return {
    model: request.model,
    prompt: request.prompt,
    ...(request.negative_prompt ? { negative_prompt: request.negative_prompt } : {}),
    size: request.size,
    n: request.n,
    steps: request.steps,
    solver: request.solver,
    guidance: request.guidance,
    ...(request.seed === undefined ? {} : { seed: request.seed }),
  };
}

/** One word for a POSIX shell, whatever is in it. */
const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** A curl command that writes the picture, or several numbered ones. */
export function curl(request, origin, needsKey) {
  const json = JSON.stringify({ ...body(request), response_format: "b64_json" }, null, 2);
  const key = needsKey ? `  -H "Authorization: Bearer $DARKROOM_API_KEY" \\\n` : "";
  const save =
    request.n === 1
      ? "jq -r '.data[0].b64_json' | base64 --decode > picture.png"
      : "jq -r '.data[].b64_json' | nl -w1 | while read -r i picture; do\n" +
        '    echo "$picture" | base64 --decode > "picture-$i.png"; done';
  return `curl -s ${origin}/v1/images/generations \\
  -H 'Content-Type: application/json' \\
${key}  -d ${shell(json)} \\
  | ${save}
`;
}

/** A Python program that writes the same. JSON's strings and numbers are Python's too. */
export function python(request, origin, needsKey) {
  const { model, prompt, size, n, ...ours } = body(request);
  const extra = Object.entries(ours)
    .map(([name, value]) => `        "${name}": ${JSON.stringify(value)},\n`)
    .join("");
  const key = needsKey ? 'os.environ["DARKROOM_API_KEY"]' : '"unused"';
  return `${needsKey ? "import os\n" : ""}from base64 import b64decode
from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${origin}/v1`)}, api_key=${key})
reply = client.images.generate(
    model=${JSON.stringify(model)},
    prompt=${JSON.stringify(prompt)},
    size=${JSON.stringify(size)},
    n=${n},
    response_format="b64_json",
    extra_body={
${extra}    },
)
for i, picture in enumerate(reply.data):
    Path(f"picture-{i + 1}.png").write_bytes(b64decode(picture.b64_json))
`;
}
