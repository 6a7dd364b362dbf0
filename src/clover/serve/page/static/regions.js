// Regions of what is open, and views of them: the picture that one model is shown at one scale.

import { getDataUri } from "./api.js";

const LONGEST = 1024; // pixels a side of a dropped image's region where its scale is unknown

/** Make a region; nobody has looked at it yet. */
export function makeRegion(box, number) {
  return { id: `region-${number}`, name: `Region ${number}`, box, turns: [], views: [], view: null };
}

/** Return ``x,y,width,height`` in µm, or null where nobody stated the size of a pixel. */
function inMicrons(box, scale) {
  if (!scale) return null;
  return [box.x * scale.x, box.y * scale.y, box.width * scale.x, box.height * scale.y]
    .map((value) => Number(value.toFixed(3))).join(",");
}

/** Name the tissue of a region as `clover ask` takes it, at a stated size of a pixel; else null. */
export function reference(content, region, scale) {
  const um = inMicrons(region.box, scale);
  return um && `${content.name}#${um}`;
}

export function sizeOf(box, scale) {
  return scale
    ? `${Math.round(box.width * scale.x)} × ${Math.round(box.height * scale.y)} µm`
    : `${Math.round(box.width)} × ${Math.round(box.height)} px`;
}

/** Whether a view is what this model would be shown now. */
export function isViewOf(view, content, model) {
  const [then, now] = [view.scale, content.micronsPerPixel];
  return view.model === model && then?.x === now?.x && then?.y === now?.y;
}

/**
 * Fetch the picture that a model is shown of a box, with everything that it hangs on.
 *
 * A conversation belongs to one view: another model, or another size of a pixel, is another view.
 */
export async function makeView(content, box, model) {
  const scale = content.micronsPerPixel;
  const um = inMicrons(box, scale);
  const view = { model, scale, origin: content.origin, um, seen: null };
  if (scale) view.seen = Math.max(box.width * scale.x, box.height * scale.y) / model.side;
  view.picture = content.kind === "slide"
    ? await slidePicture(content, um, model)
    : crop(content, box, model);
  return view;
}

/** Whom was asked, and at which scale, in words. */
export function viewText(view) {
  return view.scale
    ? `${view.model.name}, slide at ${Number(view.scale.x.toPrecision(4))} µm per pixel`
    : `${view.model.name}, µm per pixel not stated`;
}

/** A slide's region as the server reads it: at the model's µm per pixel, from any level. */
function slidePicture(content, um, model) {
  const query = new URLSearchParams({ name: content.name, region: um, model: model.name });
  if (content.stated) query.set("mpp", content.stated);
  return getDataUri(`slides/region?${query}`);
}

/** A dropped image never leaves the page but for this: the region that is asked about. */
function crop(content, box, model) {
  const scale = content.micronsPerPixel;
  const factor = scale && model.microns_per_pixel
    ? Math.min(scale.x / model.microns_per_pixel, 4096 / Math.max(box.width, box.height))
    : Math.min(1, LONGEST / Math.max(box.width, box.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(Math.round(box.width * factor), 1);
  canvas.height = Math.max(Math.round(box.height * factor), 1);
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(content.image, box.x, box.y, box.width, box.height, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}

/** What has to be said when a view's model sees another scale than it learnt, or null. */
export function scaleNote({ model, seen }) {
  const learnt = model.microns_per_pixel;
  if (!seen || !learnt) return null;
  const ratio = seen / learnt;
  if (ratio >= 0.8 && ratio <= 1.25) return null;
  const word = ratio > 1 ? "coarser" : "finer";
  return `Seen ${word} than the model learnt: ${seen.toPrecision(2)} instead of ${learnt} µm/px. ` +
    `A click draws its own field of ${Math.round(model.field_um)} µm.`;
}
