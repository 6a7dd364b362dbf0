// Where the model looked: one map over its region, and what a deletion test says of it.

import { postJson } from "./api.js";
import { removeBox, showLayer } from "./viewer.js";

const panel = document.getElementById("heat-panel");
const kinds = document.getElementById("heat-kind");
const strength = document.getElementById("heat-strength");
const verdict = document.getElementById("heat-verdict");
const VERDICTS = {
  faithful: "Faithful here",
  weak: "Weak",
  "not faithful": "Not faithful",
};
// From nothing to bright, dark to light, so that it reads without colour vision.
const STOPS = [[60, 20, 110], [150, 40, 120], [225, 85, 65], [250, 160, 40], [252, 245, 150]];

let shown = null; // {region, turn}

/**
 * Ask why an answer was given; the maps come at once, the deletion test takes longer.
 *
 * The model that answered is asked, about the picture it was shown, whatever is picked by now.
 */
export async function explain(turn, deletion) {
  const { question, answer, view } = turn;
  const found = await postJson("talk/why", {
    model: view.model.name, image: view.picture, question, answer, deletion,
  });
  turn.why = { ...turn.why, ...found };
  return turn.why;
}

/** The maps by name, the most telling first. */
function maps(why) {
  const rows = [["Rollout", why.rollout], ["Mean of all", why.mean]];
  why.layers.forEach((layer, number) => rows.push([`Layer ${number + 1}, mean`, layer.mean]));
  why.layers.forEach((layer, number) => layer.queries.forEach((query, place) => {
    rows.push([`Layer ${number + 1}, query ${place + 1}`, query]);
  }));
  return rows;
}

/** Paint a map [grid x grid], scaled to its own largest value. */
export function paint(heat, grid, opacity) {
  const canvas = document.createElement("canvas");
  const scale = 16; // smooth between places: the map has no more detail than its grid
  canvas.width = canvas.height = grid * scale;
  const small = document.createElement("canvas");
  small.width = small.height = grid;
  const pen = small.getContext("2d");
  const pixels = pen.createImageData(grid, grid);
  const least = Math.min(...heat);
  const most = Math.max(...heat);
  heat.forEach((value, place) => {
    const share = most > least ? (value - least) / (most - least) : 0;
    const position = share * (STOPS.length - 1);
    const below = Math.min(Math.floor(position), STOPS.length - 2);
    for (let channel = 0; channel < 3; channel += 1) {
      const [from, to] = [STOPS[below][channel], STOPS[below + 1][channel]];
      pixels.data[place * 4 + channel] = from + (to - from) * (position - below);
    }
    pixels.data[place * 4 + 3] = 255 * opacity * Math.min(1, 0.15 + share);
  });
  pen.putImageData(pixels, 0, 0);
  const large = canvas.getContext("2d");
  large.imageSmoothingQuality = "high";
  large.drawImage(small, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/** Where a map peaks, in words, for whoever does not see it. */
function peak(heat, grid) {
  const place = heat.indexOf(Math.max(...heat));
  const [row, column] = [Math.floor(place / grid), place % grid];
  const third = (value) => Math.min(Math.floor((value / grid) * 3), 2);
  const down = ["top", "middle", "bottom"][third(row)];
  const across = ["left", "centre", "right"][third(column)];
  return `strongest at the ${down} ${across} of the region`;
}

function draw() {
  const { region, turn } = shown;
  const [name, heat] = maps(turn.why)[kinds.selectedIndex];
  const canvas = paint(heat, turn.why.grid, strength.value / 100);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${name}: ${peak(heat, turn.why.grid)}`);
  showLayer("heat", region.box, canvas);
}

function say(turn) {
  const test = turn.why.deletion;
  verdict.replaceChildren();
  if (!test) {
    verdict.textContent = "Testing whether the answer hangs on these places …";
    return;
  }
  const mark = document.createElement("span");
  mark.className = `verdict ${test.label.replace(" ", "-")}`;
  mark.textContent = VERDICTS[test.label];
  verdict.append(mark, deletionText(test));
}

/** The deletion test in a sentence. */
export function deletionText(test) {
  const middle = 1;
  const share = Math.round(test.shares[middle] * 100);
  const kept = (nats) => {
    const percent = Math.exp(-nats) * 100;
    return percent < 1 ? "less than 1 %" : `${Math.round(percent)} %`;
  };
  const endings = {
    faithful: "The answer hangs on what the map shows.",
    weak: "The answer hangs on these places little more than on others.",
    "not faithful": "Do not read this map as a reason: other places matter as much.",
  };
  return `Without the ${share} % most attended places the answer keeps ${kept(test.attended[middle])} ` +
    `of its likelihood, without as many at random ${kept(test.random[middle])}. ${endings[test.label]}`;
}

/** Show the map of an answer over its region, then test it. */
export async function showHeat(region, turn) {
  if (!turn.why) await explain(turn, false);
  shown = { region, turn };
  kinds.replaceChildren(...maps(turn.why).map(([name]) => new Option(name)));
  panel.hidden = false;
  draw();
  say(turn);
  if (!turn.why.deletion) {
    await explain(turn, true);
    if (shown?.turn === turn) say(turn);
  }
}

export function hideHeat() {
  if (!shown) return;
  removeBox("heat");
  shown = null;
  panel.hidden = true;
}

export function isShown(turn) {
  return shown?.turn === turn;
}

kinds.addEventListener("change", draw);
strength.addEventListener("input", draw);
