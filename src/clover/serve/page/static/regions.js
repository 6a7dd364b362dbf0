// Regions of what is open, each with the picture the model is shown and its own conversation.

import { getDataUri } from "./api.js";

const LONGEST = 1024; // pixels a side of a dropped image's region where its scale is unknown

/** Return ``x,y,width,height`` in µm, or null where nobody stated the size of a pixel. */
function inMicrons(box, scale) {
  if (!scale) return null;
  return [box.x * scale.x, box.y * scale.y, box.width * scale.x, box.height * scale.y]
    .map((value) => Number(value.toFixed(3))).join(",");
}

/** Make a region and fetch its picture. */
export async function makeRegion(content, box, number, model) {
  const scale = content.micronsPerPixel;
  const um = inMicrons(box, scale);
  const region = { id: `region-${number}`, name: `Region ${number}`, box, um, turns: [] };
  if (scale) {
    const side = Math.max(box.width * scale.x, box.height * scale.y);
    region.seen = side / model.side;
    region.size = `${Math.round(box.width * scale.x)} × ${Math.round(box.height * scale.y)} µm`;
  } else {
    region.seen = null;
    region.size = `${Math.round(box.width)} × ${Math.round(box.height)} px`;
  }
  region.picture = content.kind === "slide"
    ? await slidePicture(content, um, model)
    : crop(content, box, model);
  return region;
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

/** What has to be said when the model sees another scale than it learnt, or null. */
export function scaleNote(region, model) {
  const learnt = model.microns_per_pixel;
  if (!region.seen || !learnt) return null;
  const ratio = region.seen / learnt;
  if (ratio >= 0.8 && ratio <= 1.25) return null;
  const word = ratio > 1 ? "coarser" : "finer";
  return `Seen ${word} than the model learnt: ${region.seen.toPrecision(2)} instead of ${learnt} µm/px. ` +
    `A click draws its own field of ${Math.round(model.field_um)} µm.`;
}
