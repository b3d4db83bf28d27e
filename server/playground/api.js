// The server's API as the page needs it; the only file that knows how it looks on the wire.

const RECONNECTIONS = 5;
const RECONNECT_MS = 500;

/** An error of the server, or of the way to it. */
export class ApiError extends Error {
  constructor({ message, param = null, status = 0, retryAfterS = null }) {
    super(message);
    Object.assign(this, { param, status, retryAfterS });
  }
}

export class Api {
  constructor() {
    this.#remember(() => sessionStorage.getItem("darkroom-key"));
  }

  #key = "";

  get hasKey() {
    return this.#key !== "";
  }

  set key(key) {
    this.#key = key;
    this.#remember(() => sessionStorage.setItem("darkroom-key", key));
  }

  #remember(access) {
    try {
      this.#key = access() ?? this.#key;
    } catch {
      // Storage is blocked: the key lasts as long as the page.
    }
  }

  /** The models, the default first, and the solvers. */
  async offer() {
    const [models, solvers] = await Promise.all([
      this.#json("/v1/models"),
      this.#json("/playground/solvers.json"),
    ]);
    return { models: models.data.map(({ id, darkroom }) => ({ ...darkroom, id })), solvers };
  }

  /** Whether every model is warm. */
  async ready() {
    return (await fetch("/readyz")).ok;
  }

  /**
   * Draw, and tell what happens: {kind: "queued", position}, {kind: "step", index, step, steps,
   * preview} and {kind: "picture", index, src, facts}. Aborting the signal cancels the job before
   * its next step.
   */
  async *draw({ width, height, start, ...body }, signal) {
    yield* start ? this.#edit(body, start, signal) : this.#job(body, signal);
  }

  /** A picture from a prompt: a job, whose events can be taken up again. */
  async *#job(body, signal) {
    const job = await this.#json("/v1/jobs", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...body, partial_images: body.steps }),
    });
    const path = `/v1/jobs/${job.id}`;
    const cancel = () => this.#fetch(path, { method: "DELETE", keepalive: true }).catch(() => {});
    if (signal.aborted) cancel();
    signal.addEventListener("abort", cancel);
    // Whoever closes the tab wants the picture no more.
    addEventListener("pagehide", cancel);
    try {
      for await (const { name, data } of this.#events(`${path}/events`, signal)) {
        if (name === "queued") yield { kind: "queued", position: data.position };
        else if (name === "progress") yield step(data);
        else if (name === "picture") yield await this.#picture(data);
        else if (name === "error" || data.error) throw new ApiError(data.error);
        else if (name === "done") return;
      }
    } finally {
      signal.removeEventListener("abort", cancel);
      removeEventListener("pagehide", cancel);
    }
  }

  /** A picture from a picture: a stream. Hanging up cancels it. */
  async *#edit(fields, start, signal) {
    const form = new FormData();
    form.append("image", start);
    const all = { ...fields, stream: true, partial_images: fields.steps };
    for (const [name, value] of Object.entries(all)) form.append(name, value);
    const reply = await this.#fetch("/v1/images/edits", { method: "POST", body: form, signal });
    for await (const { name, data } of parse(reply.body)) {
      if (name === "error") throw new ApiError(data.error);
      const { b64_json, output_format, darkroom } = data;
      if (name.endsWith(".partial_image")) yield step({ ...darkroom, preview_b64: b64_json });
      else {
        const bytes = Uint8Array.from(atob(b64_json), (letter) => letter.charCodeAt(0));
        yield finished(new Blob([bytes], { type: `image/${output_format}` }), darkroom);
      }
    }
  }

  /** A finished picture, fetched: links expire, and the server forgets; this tab does not. */
  async #picture({ index, url, darkroom }) {
    // Behind a proxy the server may know itself by another name than this page does.
    const { pathname, search } = new URL(url);
    return finished(await (await this.#fetch(pathname + search)).blob(), { ...darkroom, index });
  }

  /** Server-sent events, taken up again where a lost connection left off. */
  async *#events(path, signal) {
    let last = null;
    for (let lost = 0; ; lost += 1) {
      try {
        const headers = last === null ? {} : { "last-event-id": last };
        const reply = await this.#fetch(path, { headers, signal });
        if (reply.status === 204) return; // all of it was heard
        for await (const event of parse(reply.body)) {
          last = event.id ?? last;
          lost = 0;
          yield event;
        }
      } catch (error) {
        if (signal.aborted || error.status || lost >= RECONNECTIONS) throw error;
      }
      await new Promise((resolve) => setTimeout(resolve, RECONNECT_MS * 2 ** lost));
    }
  }

  async #json(path, init) {
    return (await this.#fetch(path, init)).json();
  }

  async #fetch(path, { headers = {}, ...init } = {}) {
    const key = this.hasKey ? { authorization: `Bearer ${this.#key}` } : {};
    let reply;
    try {
      reply = await fetch(path, { ...init, headers: { ...headers, ...key } });
    } catch (error) {
      if (init.signal?.aborted) throw error;
      throw new ApiError({ message: "The server cannot be reached." });
    }
    if (reply.ok) return reply;
    const { error } = await reply.json().catch(() => ({}));
    const message = error?.message ?? `The server answered ${reply.status}.`;
    const retryAfterS = Number(reply.headers.get("retry-after")) || null;
    throw new ApiError({ message, param: error?.param, status: reply.status, retryAfterS });
  }
}

/** Events of a text/event-stream body, as {name, id, data}. */
async function* parse(body) {
  let text = "";
  for await (const chunk of chunks(body.pipeThrough(new TextDecoderStream()))) {
    text += chunk;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const event = { name: "message", id: null, data: "" };
      for (const line of block.split("\n")) {
        const [, field, value] = /^([^:]*): ?(.*)$/.exec(line) ?? [];
        if (field === "event") event.name = value;
        else if (field === "id") event.id = value;
        else if (field === "data") event.data += value;
      }
      if (event.data) yield { ...event, data: JSON.parse(event.data) };
    }
  }
}

/** A stream's chunks; not every browser can iterate streams themselves. */
async function* chunks(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function step({ index, step, steps, preview_b64 }) {
  const preview = preview_b64 ? `data:image/png;base64,${preview_b64}` : null;
  return { kind: "step", index, step, steps, preview };
}

function finished(blob, { index, width_px, height_px, timings_ms, ...facts }) {
  const format = blob.type.replace("image/", "");
  const known = { ...facts, width: width_px, height: height_px, timings: timings_ms, format };
  return { kind: "picture", index, blob, src: URL.createObjectURL(blob), facts: known };
}
