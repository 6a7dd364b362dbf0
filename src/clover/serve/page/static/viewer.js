// The slide: tiles, scale bar, rectangles over it, and drawing one by mouse, finger or keys.
// Everything inside is in pixels of the finest level; µm are worked out where they are shown.
/* global OpenSeadragon */

import { headers } from "./api.js";

const stage = document.getElementById("viewer");
const drawLayer = document.getElementById("draw");
const drawHelp = document.getElementById("draw-help");
const drawButton = document.getElementById("draw-button");
const LEAST = 8; // pixels on the screen: less was a click

let viewer = null;
let content = null; // what is open: {width, height, micronsPerPixel: {x, y} | null, ...}
let boxes = new Map();

function microns() {
  return content?.micronsPerPixel ?? null;
}

/** Open a slide of the folder. */
export function openSlide(info) {
  const address = encodeURIComponent(info.name);
  return open(info, {
    width: info.width,
    height: info.height,
    tileSize: info.tile,
    tileOverlap: info.overlap,
    minLevel: Math.max(0, Math.min(8, info.levels - 2)),
    maxLevel: info.levels - 1,
    getTileUrl: (level, x, y) => `slides/tile/${level}/${x}/${y}?name=${address}`,
  });
}

/** Open an image that was dropped. */
export function openImage(info) {
  return open(info, { type: "image", url: info.url, buildPyramid: false });
}

function open(info, source) {
  viewer?.destroy();
  boxes = new Map();
  content = info;
  viewer = OpenSeadragon({
    element: stage,
    tileSources: source,
    drawer: "canvas",
    showNavigationControl: false,
    loadTilesWithAjax: Object.keys(headers()).length > 0,
    ajaxHeaders: headers(),
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
    maxZoomPixelRatio: 4,
    minZoomImageRatio: 0.8,
    visibilityRatio: 0.4,
    animationTime: matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.5,
    crossOriginPolicy: false,
  });
  viewer.canvas.setAttribute("role", "application");
  viewer.canvas.setAttribute("aria-label", "Slide. Arrows pan, plus and minus zoom, 0 shows all, R draws a region.");
  viewer.addHandler("canvas-key", (event) => {
    const key = event.originalEvent.key;
    // OpenSeadragon would rotate and flip; a slide stays as it was scanned.
    if ("rRfF".includes(key)) event.preventDefaultAction = true;
  });
  for (const name of ["animation", "open", "resize"]) viewer.addHandler(name, showScale);
  return new Promise((resolve, reject) => {
    viewer.addOnceHandler("open", () => resolve());
    viewer.addOnceHandler("open-failed", () => reject(new Error(`${info.name} cannot be shown.`)));
  });
}

export function zoom(factor) {
  viewer?.viewport.zoomBy(factor).applyConstraints();
}

export function fit() {
  viewer?.viewport.goHome();
}

/** State the size of a pixel afterwards. */
export function setMicrons(scale) {
  if (content) content.micronsPerPixel = scale;
  showScale();
}

function showScale() {
  const place = document.getElementById("scale");
  const scale = microns();
  place.hidden = !scale || !viewer?.world.getItemCount();
  if (place.hidden) return;
  const perScreenPixel = scale.x / viewer.viewport.viewportToImageZoom(viewer.viewport.getZoom(true));
  const most = perScreenPixel * 150;
  const power = 10 ** Math.floor(Math.log10(most));
  const length = [5, 2, 1].map((digit) => digit * power).find((value) => value <= most);
  document.getElementById("scale-text").textContent =
    length >= 1000 ? `${length / 1000} mm` : `${Number(length.toPrecision(1))} µm`;
  document.getElementById("scale-line").style.width = `${length / perScreenPixel}px`;
}

function toViewport(box) {
  return viewer.viewport.imageToViewportRectangle(box.x, box.y, box.width, box.height);
}

/** Show, or move, a rectangle; `kind` is "", "is-current" or "is-pending". */
export function showBox(id, box, label, kind = "") {
  let element = boxes.get(id);
  if (!element) {
    element = document.createElement("div");
    element.append(document.createElement("b"));
    boxes.set(id, element);
    viewer.addOverlay({ element, location: toViewport(box) });
  } else {
    viewer.updateOverlay(element, toViewport(box));
  }
  element.className = `region-box ${kind}`;
  element.firstChild.textContent = label;
  element.firstChild.hidden = !label;
}

export function removeBox(id) {
  const element = boxes.get(id);
  if (element) viewer.removeOverlay(element);
  boxes.delete(id);
}

/** Lay a picture over a rectangle; it replaces the one that lay there. */
export function showLayer(id, box, canvas) {
  removeBox(id);
  canvas.className = "heat-layer";
  boxes.set(id, canvas);
  viewer.addOverlay({ element: canvas, location: toViewport(box) });
}

/** Bring a rectangle into view, with room around it. */
export function lookAt(box) {
  const place = toViewport(box);
  const room = Math.max(place.width, place.height) * 0.35;
  viewer.viewport.fitBounds(new OpenSeadragon.Rect(
    place.x - room, place.y - room, place.width + 2 * room, place.height + 2 * room));
}

// --- drawing -----------------------------------------------------------------------------------

let drawing = null; // {box, start, onDone, field}
let whenDone = () => {};
let fieldOf = () => null;
let announce = () => {};

/** Say what happens with a finished rectangle, and how wide a field of view is in pixels. */
export function onDrawn(done, field, say) {
  whenDone = done;
  fieldOf = field;
  announce = say;
}

export function startDrawing() {
  if (!viewer?.world.getItemCount() || drawing) return;
  drawing = { box: null, start: null };
  drawLayer.hidden = false;
  drawHelp.hidden = false;
  drawButton.setAttribute("aria-pressed", "true");
  drawLayer.focus();
}

export function stopDrawing() {
  if (!drawing) return;
  removeBox("pending");
  drawing = null;
  drawLayer.hidden = true;
  drawHelp.hidden = true;
  drawButton.setAttribute("aria-pressed", "false");
  viewer.canvas.focus({ preventScroll: true });
}

function pointAt(event) {
  const frame = drawLayer.getBoundingClientRect();
  const pixel = new OpenSeadragon.Point(event.clientX - frame.left, event.clientY - frame.top);
  return viewer.viewport.viewportToImageCoordinates(viewer.viewport.pointFromPixel(pixel, true));
}

/** Keep a rectangle on the slide, moving it before it is cut. */
function inside(box) {
  const width = Math.min(Math.max(box.width, 2), content.width);
  const height = Math.min(Math.max(box.height, 2), content.height);
  return {
    x: Math.min(Math.max(box.x, 0), content.width - width),
    y: Math.min(Math.max(box.y, 0), content.height - height),
    width,
    height,
  };
}

function fieldAround(x, y) {
  const { width, height } = fieldOf(content);
  return inside({ x: x - width / 2, y: y - height / 2, width, height });
}

function sizeText(box) {
  const scale = microns();
  return scale
    ? `${Math.round(box.width * scale.x)} × ${Math.round(box.height * scale.y)} µm`
    : `${Math.round(box.width)} × ${Math.round(box.height)} px`;
}

function setPending(box) {
  drawing.box = box;
  showBox("pending", box, sizeText(box), "is-pending");
}

function finish() {
  const { box } = drawing;
  stopDrawing();
  if (box) whenDone(box);
}

drawLayer.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  drawLayer.setPointerCapture(event.pointerId);
  drawing.start = { point: pointAt(event), x: event.clientX, y: event.clientY };
});

drawLayer.addEventListener("pointermove", (event) => {
  if (!drawing?.start) return;
  const now = pointAt(event);
  const { point } = drawing.start;
  const left = Math.max(Math.min(point.x, now.x), 0);
  const top = Math.max(Math.min(point.y, now.y), 0);
  const right = Math.min(Math.max(point.x, now.x), content.width);
  const bottom = Math.min(Math.max(point.y, now.y), content.height);
  if (right - left < 2 || bottom - top < 2) return;
  setPending({ x: left, y: top, width: right - left, height: bottom - top });
});

drawLayer.addEventListener("pointerup", (event) => {
  if (!drawing?.start) return;
  const moved = Math.max(
    Math.abs(event.clientX - drawing.start.x), Math.abs(event.clientY - drawing.start.y));
  if (moved < LEAST) setPending(fieldAround(drawing.start.point.x, drawing.start.point.y));
  finish();
});

drawLayer.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2);
}, { passive: false });

drawLayer.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    stopDrawing();
    announce("No region drawn.");
  } else if (event.key === "Enter") {
    if (!drawing.box) placeInView();
    finish();
  } else if (event.key.startsWith("Arrow")) {
    if (!drawing.box) placeInView();
    else nudge(event.key, event.shiftKey);
    announce(`${sizeText(drawing.box)} at ${placeText(drawing.box)}`);
  } else if (event.key === "+" || event.key === "-") {
    zoom(event.key === "+" ? 1.3 : 1 / 1.3);
  } else {
    return;
  }
  event.preventDefault();
});

function placeText(box) {
  const scale = microns();
  return scale
    ? `${Math.round(box.x * scale.x)}, ${Math.round(box.y * scale.y)} µm`
    : `${Math.round(box.x)}, ${Math.round(box.y)} px`;
}

function placeInView() {
  const middle = viewer.viewport.viewportToImageCoordinates(viewer.viewport.getCenter(true));
  setPending(fieldAround(middle.x, middle.y));
}

function nudge(key, resize) {
  const view = viewer.viewport.viewportToImageRectangle(viewer.viewport.getBounds(true));
  const step = view.width / 40;
  const across = { ArrowLeft: -step, ArrowRight: step }[key] ?? 0;
  const down = { ArrowUp: -step, ArrowDown: step }[key] ?? 0;
  const { x, y, width, height } = drawing.box;
  setPending(inside(resize
    ? { x, y, width: width + across, height: height + down }
    : { x: x + across, y: y + down, width, height }));
}
