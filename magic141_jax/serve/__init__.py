"""Videos over HTTP: jobs in a folder, one thread that owns the device, routes in the shape of OpenAI's /v1/videos."""
