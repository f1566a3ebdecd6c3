"""The rows that travel: pool, queue, gather, draws, checkpoint. None knows a temperature."""
