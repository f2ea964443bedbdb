// Browsers start no worker from a page that is opened as a file. Search then runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.srcdoc = "<!doctype html><title>search</title>"
      frame.onload = () => {
        const inside = frame.contentWindow
        frame.onload = null
        inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
        const script = inside.document.createElement("script")
        script.src = url
        script.onload = () => {
          this.postMessage = data => inside.dispatchEvent(new inside.MessageEvent("message", { data }))
          this.waiting.forEach(data => this.postMessage(data))
        }
        inside.document.body.append(script)
      }
      document.body.append(frame)
    }

    postMessage(data) {
      this.waiting.push(data)
    }

    terminate() {}
  }
}
