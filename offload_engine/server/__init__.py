"""The HTTP server: OpenAI's endpoints, statistics, and the page that shows denoising. Needs the extra `serve`."""
