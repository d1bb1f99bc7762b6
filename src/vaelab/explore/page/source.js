/* Where the bundle comes from: pieces inside this file (gzip, base64), or files beside it. Nothing else knows which. */

export const FORMAT = 1;

/** What is wrong with the bundle, in one sentence for the reader. */
export class BundleError extends Error {}

const AGAIN = "make the page again with vaelab explore";
let pieces = {};

/** The manifest. Throws BundleError where it is missing, cut off or of a newer format. */
export async function manifest() {
  const inside = document.getElementById("vaelab-manifest");
  const text = inside ? inside.textContent : new TextDecoder().decode(await file("manifest.json"));
  let read;
  try {
    read = JSON.parse(text);
  } catch {
    throw new BundleError(`The manifest of this page is damaged or cut off: copy the page again, or ${AGAIN}.`);
  }
  if (!(read.format <= FORMAT))
    throw new BundleError(
      `This bundle has format ${read.format} and the page reads format ${FORMAT}: a newer vaelab made it; ${AGAIN} of that version.`,
    );
  if (!read.pieces || !read.data || !read.runs?.length)
    throw new BundleError(`The manifest of this page lists no runs, data or pieces: ${AGAIN}.`);
  pieces = read.pieces;
  return read;
}

/** The bytes of a piece. Throws BundleError where it is missing or has not the length that the manifest gives. */
export async function piece(name) {
  const inside = document.getElementById(`piece:${name}`);
  let bytes;
  try {
    bytes = inside ? await unpack(inside) : await file(name);
  } catch (error) {
    if (error instanceof BundleError) throw error;
    throw new BundleError(`The piece ${name} of this page is damaged or cut off: copy the page again, or ${AGAIN}.`);
  }
  const expected = pieces[name]?.bytes;
  if (bytes.length !== expected)
    throw new BundleError(
      `The piece ${name} has ${bytes.length} bytes and ${expected ?? "none"} were expected: copy the page again, or ${AGAIN}.`,
    );
  return bytes;
}

export const floats = async (name) => new Float32Array((await piece(name)).slice().buffer);

/** onnxruntime-web, from its two pieces; one thread, since more need a server that isolates the page. */
export async function runtime() {
  const url = URL.createObjectURL(new Blob([await piece("ort.mjs")], { type: "text/javascript" }));
  const ort = await import(url);
  URL.revokeObjectURL(url);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = await piece("ort.wasm");
  ort.env.logLevel = "error";
  return ort;
}

async function unpack(element) {
  const text = element.textContent.trim();
  // a data: address is the way of older browsers: ten times slower
  const packed = Uint8Array.fromBase64?.(text) ?? (await (await fetch(`data:;base64,${text}`)).arrayBuffer());
  const whole = new ReadableStream({ start: (to) => (to.enqueue(packed), to.close()) }); // in one chunk: three times faster
  const plain = await new Response(whole.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  return together(new Uint8Array(plain), Number(element.dataset.planes));
}

/** Bytes that were taken apart: all first ones of `planes`, then all second ones, … */
function together(apart, planes) {
  if (planes === 1) return apart;
  const bytes = new Uint8Array(apart.length);
  for (let plane = 0, from = 0; plane < planes; plane++)
    for (let to = plane; to < bytes.length; to += planes) bytes[to] = apart[from++];
  return bytes;
}

async function file(name) {
  let response;
  try {
    response = await fetch(name);
  } catch {
    response = { ok: false };
  }
  if (!response.ok)
    throw new BundleError(
      location.protocol === "file:"
        ? `A folder cannot be opened from a disk (${name} cannot be read): serve it, or make one file with vaelab explore --export.`
        : `The file ${name} of this page is missing: copy the whole folder again, or ${AGAIN}.`,
    );
  return new Uint8Array(await response.arrayBuffer());
}
