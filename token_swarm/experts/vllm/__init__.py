"""The backend on vLLM: sessions that can be rolled back, on its engine, scheduler and worker."""
