// What is seen: pictures while they develop, what they took, and the earlier ones of this tab.

const element = (id) => document.getElementById(id);
const PHASES = [
  ["queue", "Waiting"],
  ["encode", "Reading the prompt"],
  ["cache", "Noise cache"],
  ["denoise", "Denoising"],
  ["decode", "Decoding"],
];
/** Phases that took less would read as 0.0 ms. */
const SHOWN_MS = 0.05;
const MAX_HISTORY = 24;

/** A drawing: what was asked for and what has come back, one item a picture. */
export function drawing(request) {
  const blank = () => ({ frames: [], step: 0, steps: request.steps, src: null, blob: null, error: null, facts: null });
  return { request, pictures: Array.from({ length: request.n }, blank), seconds: null };
}

export class Tray {
  #shown = null;
  #history = [];
  #onRecall;
  #onStart;

  /** Told which drawing to bring back, and which picture to start the next one from. */
  constructor(onRecall, onStart) {
    this.#onRecall = onRecall;
    this.#onStart = onStart;
    element("scrub").addEventListener("input", () => this.#scrub());
  }

  /** The drawing on show. */
  get shown() {
    return this.#shown;
  }

  /** Show a drawing, whatever its state. */
  show(it) {
    this.#shown = it;
    const list = element("pictures");
    list.dataset.count = it.pictures.length;
    list.replaceChildren(...it.pictures.map((_, i) => figure(it, i)));
    it.pictures.forEach((_, i) => this.#paint(i));
    element("result").hidden = true;
  }

  /** One step of one picture is done; `preview` is a data URL, or null. */
  step(i, step, steps, preview) {
    const picture = this.#shown.pictures[i];
    // After a failover or a reconnection the same steps come again.
    if (step < picture.step) picture.frames.length = Math.min(picture.frames.length, step);
    Object.assign(picture, { step, steps });
    if (preview) picture.frames[step - 1] = preview;
    this.#paint(i);
    this.#progress();
  }

  /** A picture is finished. */
  finish(i, src, blob, facts) {
    Object.assign(this.#shown.pictures[i], { src, blob, facts, step: facts.steps, steps: facts.steps });
    this.#paint(i);
    this.#progress();
  }

  /** A picture will not come. */
  fail(i, message) {
    const picture = this.#shown.pictures[i];
    if (picture.src === null) picture.error = message;
    this.#paint(i);
  }

  /** Say how it stands while it has not begun. */
  waiting(text) {
    element("meter").hidden = false;
    element("progress").removeAttribute("value");
    element("progress-text").textContent = text;
  }

  /** All is said: hide the meter, show times and facts, and keep the drawing. */
  close(seconds) {
    const it = this.#shown;
    it.seconds = seconds;
    element("meter").hidden = true;
    if (!it.pictures.some(({ src }) => src)) return;
    this.summary();
    this.#history.unshift(it);
    for (const { pictures } of this.#history.splice(MAX_HISTORY))
      pictures.forEach(({ src }) => src && URL.revokeObjectURL(src));
    this.#list();
  }

  /** Times, seed and the slider of a finished drawing. */
  summary() {
    const { pictures, seconds, request } = this.#shown;
    const finished = pictures.filter(({ facts }) => facts);
    const slowest = finished.reduce((a, b) => (b.facts.timings.total > a.facts.timings.total ? b : a));
    times(slowest.facts.timings);
    const { model, solver, schedule, steps, guidance, width, height, approximations } = slowest.facts;
    facts([
      ["Seed", finished.map(({ facts: { seed } }) => seed).join(", ")],
      ["Size", `${width} × ${height} px`],
      ["Solver", `${solver}, ${schedule}, ${steps} steps, guidance ${guidance}`],
      ["Model", model],
      ["Shortcuts", Object.entries(approximations).map(([name, dial]) => `${name}: ${dial}`).join(", ") || "none: exact"],
      ["In all", `${seconds.toFixed(2)} s in this browser` + (request.n > 1 ? "; the bar shows the slowest picture" : "")],
    ]);
    const frames = Math.max(...pictures.map((picture) => picture.frames.length));
    element("scrub-field").hidden = frames < 2;
    element("scrub").max = frames + 1;
    element("scrub").value = frames + 1;
    this.#scrub();
    element("result").hidden = false;
  }

  #scrub() {
    const [at, last] = ["value", "max"].map((name) => Number(element("scrub")[name]));
    const text = at === last ? "finished" : `step ${at} of ${last - 1}`;
    element("scrub-value").textContent = text;
    element("scrub").setAttribute("aria-valuetext", text);
    this.#shown?.pictures.forEach(({ frames, src }, i) => {
      const image = element("pictures").children[i]?.querySelector("img");
      const frame = at === last ? src : (frames.slice(0, at).findLast(Boolean) ?? src);
      if (!image || !frame) return;
      image.src = frame;
      image.classList.toggle("final", frame === src);
    });
  }

  #paint(i) {
    const { request, pictures } = this.#shown;
    const { src, blob, frames, error, facts: known } = pictures[i];
    const item = element("pictures").children[i];
    const image = item.querySelector("img");
    const latest = src ?? frames.findLast(Boolean);
    item.querySelector(".frame").classList.toggle("waiting", !latest && !error);
    image.hidden = !latest;
    if (latest && image.getAttribute("src") !== latest) image.src = latest;
    image.classList.toggle("final", src !== null);
    image.alt = src ? request.prompt : `Unfinished: ${request.prompt}`;
    const caption = item.querySelector("figcaption");
    if (src) {
      const next = startButton(known, () => this.#onStart(blob));
      caption.replaceChildren(span(`seed ${known.seed}`), next, download(src, known));
    } else if (error) caption.replaceChildren(span(error, "failed"));
  }

  #progress() {
    const { pictures } = this.#shown;
    const [done, all] = ["step", "steps"].map((name) => pictures.reduce((sum, it) => sum + it[name], 0));
    element("meter").hidden = false;
    element("progress").value = done / all;
    element("progress-text").textContent =
      pictures.length === 1 ? `step ${done} of ${all}` : `${Math.round((100 * done) / all)} %`;
  }

  #list() {
    element("history").hidden = this.#history.length < 2;
    element("history-list").replaceChildren(
      ...this.#history.map((it) => {
        const button = document.createElement("button");
        button.type = "button";
        const image = new Image();
        image.src = it.pictures.find(({ src }) => src).src;
        image.alt = it.request.prompt;
        button.title = it.request.prompt;
        button.append(image);
        button.addEventListener("click", () => this.#onRecall(it));
        const item = document.createElement("li");
        item.append(button);
        return item;
      }),
    );
  }
}

function figure({ request, pictures }, i) {
  const item = document.createElement("li");
  const box = document.createElement("figure");
  const frame = document.createElement("div");
  frame.className = "frame";
  frame.style.setProperty("--ratio", `${request.width} / ${request.height}`);
  const image = new Image();
  image.hidden = true;
  frame.append(image);
  const caption = document.createElement("figcaption");
  const name = pictures.length === 1 ? "" : `picture ${i + 1}, `;
  caption.append(span(`${name}seed ${request.seed + i}`));
  box.append(frame, caption);
  item.append(box);
  return item;
}

function times(timings) {
  const taken = PHASES.filter(([name]) => timings[name] >= SHOWN_MS);
  element("bar").replaceChildren(
    ...taken.map(([name]) => {
      const part = span("", name);
      part.style.setProperty("--share", timings[name]);
      return part;
    }),
  );
  element("phases").replaceChildren(
    ...taken.map(([name, label]) => pair(label, duration(timings[name]), name)),
  );
}

function facts(rows) {
  const parts = rows.flatMap(([label, text]) => [...pair(label, text).children]);
  element("facts").replaceChildren(...parts);
}

function pair(label, text, className = "") {
  const row = document.createElement("div");
  row.className = className;
  const term = document.createElement("dt");
  term.textContent = label;
  const value = document.createElement("dd");
  value.textContent = text;
  row.append(term, value);
  return row;
}

function span(text, className = "") {
  const made = document.createElement("span");
  made.textContent = text;
  made.className = className;
  return made;
}

function startButton({ seed }, onClick) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Start from it";
  button.setAttribute("aria-label", `Start from it: the picture with seed ${seed}`);
  button.addEventListener("click", onClick);
  return button;
}

function download(src, { seed, format }) {
  const link = document.createElement("a");
  link.href = src;
  link.download = `darkroom-${seed}.${format}`;
  link.textContent = "Download";
  link.setAttribute("aria-label", `Download: the picture with seed ${seed}`);
  return link;
}

const duration = (ms) => (ms < 10 ? `${ms.toFixed(1)} ms` : ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);
