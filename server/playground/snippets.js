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

/** The file to start from: under its own name where that needs no quotes. */
const fileOf = ({ start }) => (/^\w[\w.-]*$/.test(start.name ?? "") ? start.name : "start.png");

/** A curl command that writes the picture, or several numbered ones. */
export function curl(request, origin, needsKey) {
  const key = needsKey ? `  -H "Authorization: Bearer $DARKROOM_API_KEY" \\\n` : "";
  const save =
    request.n === 1
      ? "jq -r '.data[0].b64_json' | base64 --decode > picture.png"
      : "jq -r '.data[].b64_json' | nl -w1 | while read -r i picture; do\n" +
        '    echo "$picture" | base64 --decode > "picture-$i.png"; done';
  const fields = { ...body(request), response_format: "b64_json" };
  const json = shell(JSON.stringify(fields, null, 2));
  const [path, sent] = request.start
    ? ["edits", form(fileOf(request), { ...fields, strength: request.strength })]
    : ["generations", `  -H 'Content-Type: application/json' \\\n  -d ${json} \\\n`];
  return `curl -s ${origin}/v1/images/${path} \\\n${key}${sent}  | ${save}\n`;
}

/** A form. Only --form-string takes values that begin with an @ as they are. */
function form(file, fields) {
  const lines = Object.entries(fields).map(([name, value]) => shell(`${name}=${value}`));
  return [`  -F image=@${file}`, ...lines.map((line) => `  --form-string ${line}`), ""].join(" \\\n");
}

/** A Python program that writes the same. JSON's strings and numbers are Python's too. */
export function python(request, origin, needsKey) {
  const { model, prompt, size, n, ...rest } = body(request);
  const ours = request.start ? { ...rest, strength: request.strength } : rest;
  const [verb, image] = request.start
    ? ["edit", `    image=Path("${fileOf(request)}").open("rb"),\n`]
    : ["generate", ""];
  const extra = Object.entries(ours)
    .map(([name, value]) => `        "${name}": ${JSON.stringify(value)},\n`)
    .join("");
  const key = needsKey ? 'os.environ["DARKROOM_API_KEY"]' : '"unused"';
  return `${needsKey ? "import os\n" : ""}from base64 import b64decode
from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${origin}/v1`)}, api_key=${key})
reply = client.images.${verb}(
${image}    model=${JSON.stringify(model)},
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
