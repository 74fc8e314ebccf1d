// Browsers start no worker for a page opened from a folder; there the search runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      const script = frame.contentDocument.createElement("script")
      this.loaded = new Promise((resolve, reject) => {
        script.onload = resolve
        script.onerror = reject
      })
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.send = (data) => inside.dispatchEvent(new inside.MessageEvent("message", { data }))
      script.src = url
      frame.contentDocument.body.append(script)
    }

    postMessage(data) {
      this.loaded.then(() => this.send(data))
    }
  }
}
