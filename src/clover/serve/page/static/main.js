// The page: what is open, its regions, and the conversation about each.

import { getJson, request, streamAnswer } from "./api.js";
import { saveJson, savePage } from "./export.js";
import { explain, hideHeat, isShown, showHeat } from "./heat.js";
import { isViewOf, makeRegion, makeView, scaleNote, sizeOf, viewText } from "./regions.js";
import * as slide from "./viewer.js";

const at = (id) => document.getElementById(id);
const state = { setup: null, model: null, content: null, regions: [], current: null, count: 0, running: null };

// --- small things ------------------------------------------------------------------------------

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

function say(text) {
  at("live").textContent = text;
}

let messageTimer = 0;
function complain(error) {
  const text = error.message ?? String(error);
  const place = at("message");
  place.textContent = text;
  place.hidden = false;
  clearTimeout(messageTimer);
  messageTimer = setTimeout(() => { place.hidden = true; }, 9000);
}

const guarded = (work) => async (...given) => {
  try {
    await work(...given);
  } catch (error) {
    complain(error);
  }
};

// --- opening -----------------------------------------------------------------------------------

function begin(content) {
  state.running?.abort();
  hideHeat();
  slide.stopDrawing();
  if (state.content?.url) URL.revokeObjectURL(state.content.url);
  Object.assign(state, { content, regions: [], current: null, count: 0 });
  at("title").textContent = content.name;
  document.title = `${content.name.split("/").pop()} · CLOVER`;
  at("empty").hidden = true;
  at("tools").hidden = false;
  show();
}

async function openSlide(name) {
  at("chooser").close();
  const info = await getJson(`slides/info?${new URLSearchParams({ name })}`);
  const content = {
    ...info, kind: "slide", micronsPerPixel: info.microns_per_pixel, origin: info.origin, stated: null,
  };
  begin(content);
  await slide.openSlide(content);
  history.replaceState(null, "", `#${encodeURIComponent(name)}`);
  say(`${name} is open.`);
}

async function openImage(file) {
  if (at("chooser").open) at("chooser").close();
  await ready();
  let image;
  try {
    image = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name} is no image that a browser opens; a slide belongs in the folder of --slides`);
  }
  const content = {
    kind: "image", name: file.name, width: image.width, height: image.height, image,
    url: URL.createObjectURL(file), micronsPerPixel: null, origin: null,
  };
  begin(content);
  await slide.openImage(content);
  history.replaceState(null, "", location.pathname);
  say(`${file.name} is open.`);
  // A dropped image is mostly one field of view: it can be asked about at once.
  await addRegion({ x: 0, y: 0, width: image.width, height: image.height }, "Whole image");
}

async function listSlides() {
  await ready();
  at("slides-part").hidden = !state.setup.has_slides;
  at("no-slides").hidden = state.setup.has_slides;
  if (!state.setup.has_slides) return;
  const { slides } = await getJson("slides");
  const wanted = at("filter").value.trim().toLowerCase();
  const items = slides.filter(({ name }) => name.toLowerCase().includes(wanted)).slice(0, 200);
  at("slides").replaceChildren(...items.map(({ name, bytes }) => {
    const picture = element("img", { alt: "", width: 134, height: 110 });
    thumbnails.observe(Object.assign(picture, { slideName: name }));
    const size = bytes > 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${(bytes / 1e6).toFixed(1)} MB`;
    return element("li", {}, element("button", { type: "button", onclick: guarded(() => openSlide(name)) },
      picture, element("span", {}, name), element("span", { class: "quiet" }, size)));
  }));
}

// A folder may hold thousands of slides: only pictures in view are made.
const thumbnails = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    thumbnails.unobserve(target);
    request(`slides/thumbnail?${new URLSearchParams({ name: target.slideName })}`)
      .then((response) => response.blob())
      .then((blob) => { target.src = URL.createObjectURL(blob); })
      .catch((error) => { target.alt = error.message; });
  }
});

const choose = guarded(async () => {
  at("chooser").showModal();
  await listSlides();
});

// --- regions -----------------------------------------------------------------------------------

function field(content) {
  const scale = content.micronsPerPixel;
  const um = state.model.field_um;
  if (scale && um) return { width: um / scale.x, height: um / scale.y };
  const side = Math.min(content.width, content.height) / 3;
  return { width: side, height: side };
}

function draw() {
  if (!state.content) return;
  if (state.content.kind === "slide" && !state.content.micronsPerPixel) {
    complain(new Error("This slide does not state its µm per pixel; give it first."));
    at("mpp")?.focus();
    return;
  }
  slide.startDrawing();
}

/**
 * See to it that a region's view is the picked model's at the stated size of a pixel.
 *
 * Each view has a conversation of its own: a model is never told another's answers, nor what was
 * answered about tissue of another size. Coming back to a view goes on with its conversation.
 */
async function look(region) {
  const { content, model } = state;
  const isCurrent = (view) => isViewOf(view, content, model);
  if (region.view && isCurrent(region.view)) return;
  let view = region.views.find(isCurrent);
  if (!view) {
    const scale = content.micronsPerPixel;
    region.view = null; // until it is read, or where it cannot be, nothing is asked
    view = await makeView(content, region.box, model);
    // Meanwhile another model was picked, or another size stated: that look is under way.
    if (model !== state.model || scale !== content.micronsPerPixel) return;
    const twin = region.views.find(isCurrent); // picked, left and picked again before it was read
    if (!twin) region.views.push(view);
    view = twin ?? view;
  }
  region.view = view;
}

/** Look at every region anew, once the model or the size of a pixel is another. */
async function lookAgain() {
  const looks = Promise.allSettled(state.regions.map(look));
  show();
  const failed = (await looks).find(({ status }) => status === "rejected");
  show();
  if (failed) throw failed.reason;
}

async function addRegion(box, name = null) {
  const content = state.content;
  const region = makeRegion(box, state.count + 1);
  while (!region.view) {
    await look(region);
    if (content !== state.content) return;
  }
  state.count += 1;
  if (name) region.name = name;
  state.regions.push(region);
  select(region);
  say(`${region.name}, ${sizeOf(box, region.view.scale)}. Ask about it.`);
  at("question").focus({ preventScroll: true });
}

function select(region) {
  if (state.current !== region) hideHeat();
  state.current = region;
  show();
}

function remove(region) {
  state.regions = state.regions.filter((other) => other !== region);
  slide.removeBox(region.id);
  hideHeat();
  select(state.regions.at(-1) ?? null);
  say(`${region.name} is removed.`);
}

// --- showing -----------------------------------------------------------------------------------

function show() {
  const { regions, current, content } = state;
  for (const region of regions) {
    slide.showBox(region.id, region.box, region.name, region === current ? "is-current" : "");
  }
  at("regions").replaceChildren(...regions.map((region) => element("button", {
    type: "button",
    "aria-pressed": String(region === current),
    onclick: guarded(async () => {
      select(region);
      slide.lookAt(region.box);
      await look(region);
      show();
    }),
  }, region.name)));
  showAbout();
  showTurns();
  const canAsk = Boolean(current?.view) && !state.running;
  at("send").disabled = !canAsk;
  for (const button of at("suggestions").children) button.disabled = !canAsk;
  at("question").placeholder = current ? `Ask about ${current.name.toLowerCase()}` : "Draw a region, then ask about it";
  const hasTurns = regions.some((region) => region.turns.length);
  at("save-json").disabled = at("save-page").disabled = !hasTurns;
  at("turns").dataset.empty = current
    ? "Nothing asked yet. Take a suggestion, or write a question."
    : content ? "Draw a region on the slide to ask about it." : "";
}

function showAbout() {
  const { current, content } = state;
  const parts = [];
  if (current) parts.push(element("div", { class: "row" }, ...viewParts(current)));
  if (content && (!content.micronsPerPixel || content.origin !== "header")) parts.push(scaleForm());
  at("about").replaceChildren(...parts);
}

/** The picture that the picked model is shown of a region, and what has to be said of it. */
function viewParts(region) {
  const { view } = region;
  const removal = element("button", { type: "button", class: "plain", onclick: () => remove(region) }, "Remove region");
  if (!view) {
    return [element("div", {}, element("p", {}, `${state.model.name} was not shown this region yet.`), removal)];
  }
  const caution = scaleNote(view);
  const anew = newConversation(region);
  return [
    element("img", { src: view.picture, alt: `${region.name} as the model sees it`, width: 76, height: 76 }),
    element("div", {},
      element("p", {}, element("strong", {}, sizeOf(region.box, view.scale)), view.seen ? `, seen at ${view.seen.toPrecision(2)} µm/px` : ""),
      caution ? element("p", { class: "caution" }, caution) : null,
      anew ? element("p", { class: "caution" }, anew) : null,
      view.um ? element("p", {}, `At ${view.um.split(",").slice(0, 2).map((value) => Math.round(value)).join(", ")} µm`) : null,
      removal),
  ];
}

/** What has to be said when the next question leaves the last answers behind, or null. */
function newConversation({ turns, view }) {
  const last = turns.at(-1);
  if (!last || last.view === view) return null;
  const isKnown = turns.some((turn) => turn.view === view);
  return `The last answer is of ${viewText(last.view)}. The next question ${
    isKnown ? "goes on with the earlier conversation of" : "begins a new conversation with"} ${viewText(view)}.`;
}

/** Ask for the size of a pixel where the file does not state it; it is never guessed. */
function scaleForm() {
  const { content } = state;
  const input = element("input", {
    id: "mpp", type: "text", inputmode: "decimal", value: content.stated ?? "", placeholder: "0.25",
  });
  const estimate = content.estimate ? element("button", {
    type: "button", onclick: guarded(() => stateScale("estimate")),
  }, `Estimate ${content.estimate}`) : null;
  return element("form", { onsubmit: guarded((event) => { event.preventDefault(); return stateScale(input.value); }) },
    element("label", { for: "mpp" }, content.micronsPerPixel ? `µm per pixel (${content.origin})` : "µm per pixel is not stated:"),
    input, element("button", {}, "Set"), estimate);
}

async function stateScale(text) {
  const { content } = state;
  if (content.kind === "slide") {
    const query = new URLSearchParams({ name: content.name, mpp: text });
    const info = await getJson(`slides/info?${query}`);
    if (content !== state.content) return;
    Object.assign(content, { micronsPerPixel: info.microns_per_pixel, origin: info.origin, stated: text });
  } else {
    const value = Number(text.replace(",", "."));
    if (!(value >= 0.02 && value <= 200)) throw new Error(`'${text}' is no size of a pixel; 0.25 is usual for 40x, 0.5 for 20x`);
    Object.assign(content, { micronsPerPixel: { x: value, y: value }, origin: "user", stated: text });
  }
  slide.setMicrons(content.micronsPerPixel);
  // A picture that was cut at another scale would answer for a place it does not show.
  await lookAgain();
  say(`${content.micronsPerPixel.x.toPrecision(3)} µm per pixel.`);
}

function showTurns() {
  const turns = state.current?.turns ?? [];
  const hasSeveral = turns.some(({ view }) => view !== turns[0].view);
  at("turns").replaceChildren(...turns.map((turn, number) => {
    turn.element ??= turnElement(turn);
    turn.of.hidden = !hasSeveral || turn.view === turns[number - 1]?.view;
    return turn.element;
  }));
}

function turnElement(turn) {
  turn.of = element("p", { class: "of" }, `Asked of ${viewText(turn.view)}`);
  turn.said = element("p", { class: "said" });
  turn.unlike = element("p", { class: "unlike", hidden: true });
  turn.after = element("div", { class: "after" });
  return element("li", {}, turn.of, element("p", { class: "asked" }, turn.question), turn.said, turn.unlike, turn.after);
}

function showTurn(turn) {
  turn.said.className = `said${turn.isWriting ? " is-writing" : ""}${turn.error ? " is-error" : ""}`;
  turn.said.textContent = turn.error ?? turn.answer;
  turn.unlike.textContent = turn.note ?? "";
  turn.unlike.hidden = !turn.note;
  turn.after.replaceChildren();
  if (turn.isWriting || turn.error) return;
  const looked = element("button", {
    type: "button", "aria-pressed": String(isShown(turn)), onclick: guarded(() => toggleHeat(turn)),
  }, "Where it looked");
  turn.after.append(looked, `${turn.seconds.toFixed(1)} s${turn.isStopped ? ", stopped" : ""}`);
  if (turn.why?.yes != null) turn.after.before(chances(turn));
}

/** Yes against no, as two meters. */
function chances(turn) {
  turn.chances?.remove();
  const rows = [["yes", turn.why.yes], ["no", 1 - turn.why.yes]].flatMap(([word, value]) => {
    const percent = `${Math.round(value * 100)} %`;
    return [
      element("span", {}, word),
      element("meter", { min: 0, max: 1, value, "aria-label": `Probability of ${word}` }, percent),
      element("span", {}, percent),
    ];
  });
  turn.chances = element("div", { class: "chances", role: "group", "aria-label": "Yes against no" }, ...rows);
  return turn.chances;
}

async function toggleHeat(turn) {
  const before = state.regions.flatMap((region) => region.turns).find(isShown);
  if (isShown(turn)) {
    hideHeat();
  } else {
    const region = state.regions.find((item) => item.turns.includes(turn));
    const shown = showHeat(region, turn);
    await Promise.race([shown, new Promise((resolve) => { setTimeout(resolve, 400); })]);
    shown.then(() => say(at("heat-verdict").textContent), complain).finally(() => showTurn(turn));
  }
  if (before && before !== turn) showTurn(before);
  showTurn(turn);
}

// --- asking ------------------------------------------------------------------------------------

async function ask(question) {
  const region = state.current;
  const text = question.trim();
  if (!region?.view || !text || state.running) return;
  const { view } = region;
  const turn = { question: text, answer: "", isWriting: true, view };
  // Told are this model's own answers about this very picture, nobody else's.
  const before = region.turns.filter((item) => item.view === view && !item.error && !item.isWriting);
  region.turns.push(turn);
  const stop = new AbortController();
  state.running = stop;
  at("question").value = "";
  at("stop").hidden = false;
  at("send").hidden = true;
  show();
  showTurn(turn);
  turn.element.scrollIntoView({ block: "nearest" });
  const start = performance.now();
  try {
    await streamAnswer({
      model: view.model.name, picture: view.picture, turns: before, question: text, signal: stop.signal,
      onPiece: (piece) => { turn.answer += piece; showTurn(turn); },
      onNote: (note) => { turn.note = note; },
    });
  } catch (error) {
    if (error.name === "AbortError") turn.isStopped = true;
    else turn.error = error.message;
  }
  turn.isWriting = false;
  turn.answer = turn.answer.trim();
  turn.seconds = (performance.now() - start) / 1000;
  state.running = null;
  at("stop").hidden = true;
  at("send").hidden = false;
  show();
  showTurn(turn);
  turn.element.scrollIntoView({ block: "nearest" });
  say(turn.error ?? `Answer: ${turn.answer}${turn.note ? ` ${turn.note}` : ""}`);
  if (/^(yes|no)\b/i.test(turn.answer) && !turn.isStopped && !turn.error) {
    await explain(turn, false);
    showTurn(turn);
    turn.element.scrollIntoView({ block: "nearest" });
  }
}

// --- beginning ---------------------------------------------------------------------------------

function fillSetup() {
  const { models, questions } = state.setup;
  [state.model] = models;
  at("suggestions").replaceChildren(...questions.map((question) => element("button", {
    type: "button", disabled: true, onclick: guarded(() => ask(question)),
  }, question)));
  if (models.length > 1) {
    const picker = element("select", { "aria-label": "Model", onchange: guarded(async (event) => {
      state.model = models[event.target.selectedIndex];
      await lookAgain();
    }) }, ...models.map(({ name }) => element("option", {}, name)));
    at("model-place").replaceChildren(picker);
  } else {
    at("model-place").textContent = `Model: ${state.model.name}.`;
  }
}

function connect() {
  at("open").addEventListener("click", choose);
  at("open-first").addEventListener("click", choose);
  at("chooser-close").addEventListener("click", () => at("chooser").close());
  at("filter").addEventListener("input", guarded(listSlides));
  at("file").addEventListener("change", guarded(async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) await openImage(file);
  }));
  at("draw-button").addEventListener("click", () => {
    if (at("draw").hidden) draw();
    else slide.stopDrawing();
  });
  at("zoom-in").addEventListener("click", () => slide.zoom(1.6));
  at("zoom-out").addEventListener("click", () => slide.zoom(1 / 1.6));
  at("fit").addEventListener("click", () => slide.fit());
  at("heat-close").addEventListener("click", () => {
    const turn = state.regions.flatMap((region) => region.turns).find(isShown);
    hideHeat();
    if (turn) showTurn(turn);
  });
  at("ask").addEventListener("submit", guarded((event) => {
    event.preventDefault();
    return ask(at("question").value);
  }));
  at("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    at("ask").requestSubmit();
  });
  at("stop").addEventListener("click", () => state.running?.abort());
  at("save-json").addEventListener("click", () => saveJson(state.content, state.regions));
  at("save-page").addEventListener("click", () => savePage(state.content, state.regions));
  at("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const isDark = root.dataset.theme === "dark"
      || (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
    root.dataset.theme = isDark ? "light" : "dark";
    localStorage.setItem("clover-theme", root.dataset.theme);
  });
  slide.onDrawn(guarded(addRegion), field, say);
  addEventListener("keydown", (event) => {
    const isTyping = event.target.closest("input, textarea, select, dialog");
    if (!isTyping && !event.ctrlKey && !event.metaKey && !event.altKey && event.key.toLowerCase() === "r") draw();
  });
  addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener("drop", guarded(async (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    const [file] = event.dataTransfer.files;
    if (file) await openImage(file);
  }));
}

async function setUp() {
  state.setup = await getJson("talk/setup");
  fillSetup();
  show();
}

// A quick hand opens something before the server has said what it serves; and a server that did not
// answer is asked again.
let asked = null;
function ready() {
  asked ??= setUp().catch((error) => { asked = null; throw error; });
  return asked;
}

const start = guarded(async () => {
  await ready();
  const named = decodeURIComponent(location.hash.slice(1));
  if (named && state.setup.has_slides) await openSlide(named);
});

connect();
start();
