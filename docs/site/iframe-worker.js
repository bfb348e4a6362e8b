// The search of the theme runs in a worker. Browsers refuse workers to pages that are opened as files. There the
// worker's script runs in a hidden frame instead, with the same messages.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inner = frame.contentWindow
      this.inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.loaded = this.load(url)
      this.inner.importScripts = async (...urls) => {
        for (const each of urls) await this.load(each)
      }
    }

    load(url) {
      const script = this.inner.document.createElement("script")
      script.src = new URL(url, location.href)
      this.inner.document.body.append(script)
      return new Promise((resolve, reject) => {
        script.onload = resolve
        script.onerror = () => reject(new Error(`${url} cannot be loaded`))
      })
    }

    async postMessage(data) {
      await this.loaded
      this.inner.dispatchEvent(new MessageEvent("message", { data }))
    }
  }
  window.Worker = window.IFrameWorker
}
