// What was asked, to keep: JSON, or one page that prints and needs no network.

import { deletionText, paint } from "./heat.js";
import { reference, viewText } from "./regions.js";

const NOTICE = "Research use only, not for diagnosis.";

function save(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function stem(content) {
  return content.name.split("/").pop().replace(/\.[^.]+$/, "");
}

function turnRow(content, region, turn) {
  const { view } = turn;
  return {
    model: view.model.name,
    microns_per_pixel: view.scale,
    reference: reference(content, region, view.scale),
    seen_microns_per_pixel: view.seen,
    question: turn.question,
    answer: turn.answer,
    seconds: turn.seconds,
    ...(turn.error ? { error: turn.error } : {}),
    ...(turn.isStopped ? { stopped: true } : {}),
    ...(turn.note ? { note: turn.note } : {}),
    ...(turn.why?.yes != null ? { probability_of_yes: turn.why.yes } : {}),
    ...(turn.why?.deletion ? { deletion_test: turn.why.deletion } : {}),
  };
}

/** The models that were asked, in the order they were. */
function modelsAsked(regions) {
  return [...new Set(regions.flatMap((region) => region.turns).map((turn) => turn.view.model))];
}

/**
 * Everything as rows: what the JSON file holds.
 *
 * A region's reference holds at its own `microns_per_pixel`, which is the slide's; a turn's at the
 * size of a pixel, and of the model, that it was asked with.
 */
function rows(content, regions) {
  return {
    notice: NOTICE,
    saved: new Date().toISOString(),
    models: modelsAsked(regions).map(({ name, microns_per_pixel }) => ({ name, microns_per_pixel })),
    slide: {
      name: content.name,
      width: content.width,
      height: content.height,
      microns_per_pixel: content.micronsPerPixel,
      origin: content.origin,
    },
    regions: regions.map((region) => ({
      name: region.name,
      reference: reference(content, region, content.micronsPerPixel),
      microns_per_pixel: content.micronsPerPixel,
      pixels: [region.box.x, region.box.y, region.box.width, region.box.height].map(Math.round),
      turns: region.turns.map((turn) => turnRow(content, region, turn)),
    })),
  };
}

export function saveJson(content, regions) {
  const text = JSON.stringify(rows(content, regions), null, 2);
  save(`${stem(content)}-conversation.json`, "application/json", text);
}

function escaped(text) {
  return String(text).replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
}

function heatPicture(turn) {
  if (!turn.why) return "";
  const picture = paint(turn.why.rollout, turn.why.grid, 0.65).toDataURL();
  return `<img class="heat" src="${picture}" alt="Rollout of the attention over the region">`;
}

function turnPart(turn) {
  const yes = turn.why?.yes;
  const chance = yes == null ? "" : `<p class="small">yes ${(yes * 100).toFixed(0)} %, no ${(100 - yes * 100).toFixed(0)} %</p>`;
  const test = turn.why?.deletion;
  const map = turn.why
    ? `<figure><span class="stack"><img src="${turn.view.picture}" alt="">${heatPicture(turn)}</span>
       <figcaption>${test ? `${escaped(test.label)}: ${escaped(deletionText(test))}` : "Where it looked; not tested."}</figcaption></figure>`
    : "";
  return `<div class="turn"><p class="asked">${escaped(turn.question)}</p>
    <p class="said">${escaped(turn.error ?? turn.answer)}</p>${turn.note ? `<p class="small">${escaped(turn.note)}</p>` : ""}${chance}${map}</div>`;
}

/** Whom was asked and what it was shown, above the first turn of each view. */
function viewPart(content, region, view) {
  const seen = view.seen ? `, seen at ${view.seen.toPrecision(3)} µm/px` : "";
  return `<p class="small">${escaped(`Asked of ${viewText(view)}`)}: ${
    escaped(placeText(content, region, view.scale))}${seen}</p>
    <img class="picture" src="${view.picture}" alt="${escaped(region.name)}">`;
}

function placeText(content, region, scale) {
  const named = reference(content, region, scale);
  return named ? `${named} µm` : content.name;
}

function regionPart(content, region) {
  const turns = region.turns.map((turn, number) => {
    const isNew = turn.view !== region.turns[number - 1]?.view;
    return `${isNew ? viewPart(content, region, turn.view) : ""}${turnPart(turn)}`;
  });
  return `<section><h2>${escaped(region.name)}</h2>${turns.join("")}</section>`;
}

/** Save one self-contained page that prints. */
export function savePage(content, regions) {
  const parts = regions.filter((region) => region.turns.length).map((region) => regionPart(content, region));
  const names = modelsAsked(regions).map(({ name }) => name).join(", ");
  const page = `<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>${escaped(content.name)}: conversation</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:760px;margin:32px auto;padding:0 16px;color:#17201c;background:#fff}
h1{font-size:22px}h2{font-size:17px;border-top:1px solid #ccc;padding-top:14px;margin-top:28px}
.notice{border:1px solid #7a4a00;color:#7a4a00;padding:6px 12px;border-radius:6px;font-weight:600}
.small,figcaption{color:#55615b;font-size:13px}.picture{width:224px;border:1px solid #ccc}
.turn{break-inside:avoid;margin:16px 0}.asked{font-weight:600;margin:0}.said{margin:2px 0;white-space:pre-wrap}
figure{margin:8px 0;display:flex;gap:14px;align-items:flex-start}.stack{position:relative;flex:0 0 160px}
.stack img{width:160px;height:160px;display:block}.stack .heat{position:absolute;inset:0}
@media print{body{margin:0}.notice{-webkit-print-color-adjust:exact}}
</style></head><body><h1>${escaped(content.name)}</h1><p class="notice">${NOTICE} Answers may be wrong.</p>
<p class="small">${escaped(names)}, ${new Date().toLocaleString()}${
  content.micronsPerPixel ? `, ${content.micronsPerPixel.x.toPrecision(4)} µm/px (${escaped(content.origin)})` : ""}</p>
${parts.join("")}<p class="notice">${NOTICE}</p></body></html>`;
  save(`${stem(content)}-conversation.html`, "text/html", page);
}
