"""A server of images: one patched pipeline, a policy per request, and no image that is not protected as asked.

    python -m examples.server                                   # the embedded model, http://127.0.0.1:8000
    python -m examples.server --model NAME_OR_PATH --policy zero-pad:0.7 --threads 1

The HTTP server and the pipeline are two processes. The server (`app.py`, `pool.py`) knows nothing of torch: it takes
requests, keeps the queue and watches the worker. The worker (`worker.py`, `pipeline.py`) holds the one pipeline, which
its threads share. A worker that dies, for whatever reason, loses only the images that it was generating: the server
answers those requests with 503, keeps the queue, and starts another worker.
"""
