// Talking to the server this page came from: a token where one is wanted, errors as one line.

let token = sessionStorage.getItem("clover-token") || "";

/** Headers that every request carries. */
export function headers() {
  return token ? { Authorization: `Bearer ${token}` } : {};
}

/** Ask for the token and keep it for this tab. */
function askForToken() {
  const dialog = document.getElementById("token-dialog");
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      token = document.getElementById("token").value.trim();
      sessionStorage.setItem("clover-token", token);
      resolve(token !== "");
    }, { once: true });
  });
}

/** Fetch, or throw an Error whose message may be shown. */
export async function request(url, options = {}) {
  let response;
  try {
    response = await fetch(url, { ...options, headers: { ...options.headers, ...headers() } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer; is clover serve still running?");
  }
  if (response.status === 401 && (await askForToken())) return request(url, options);
  if (!response.ok) {
    let message = `The server answered ${response.status}.`;
    try {
      message = (await response.json()).error.message;
    } catch { /* not our shape: the status says what there is to say */ }
    throw new Error(message);
  }
  return response;
}

export async function getJson(url) {
  return (await request(url)).json();
}

export async function postJson(url, body, signal) {
  const options = { method: "POST", body: JSON.stringify(body), signal };
  return (await request(url, { ...options, headers: { "Content-Type": "application/json" } })).json();
}

/** Read a picture as a data URI. */
export async function getDataUri(url) {
  const blob = await (await request(url)).blob();
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(blob);
  });
}

/**
 * Ask, and hand over the answer piece by piece.
 *
 * `onNote` gets what the server says of an image unlike those the model learnt from.
 * The first question of a conversation carries the picture; this is OpenAI's form.
 */
export async function streamAnswer({ model, picture, turns, question, signal, onPiece, onNote }) {
  const messages = [];
  const said = (text) => (messages.length
    ? text
    : [{ type: "image_url", image_url: { url: picture } }, { type: "text", text }]);
  for (const turn of turns) {
    messages.push({ role: "user", content: said(turn.question) });
    messages.push({ role: "assistant", content: turn.answer });
  }
  messages.push({ role: "user", content: said(question) });
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model, messages, stream: true }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    waiting += value;
    const events = waiting.split(/\r?\n\r?\n/);
    waiting = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trim()).join("\n");
      if (!data || data === "[DONE]") continue;
      const row = JSON.parse(data);
      if (row.error) throw new Error(row.error.message);
      if (row.image_note) onNote(row.image_note);
      const piece = row.choices?.[0]?.delta?.content;
      if (piece) onPiece(piece);
    }
  }
}
