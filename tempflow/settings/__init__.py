"""Fields, presets, help; nothing heavy is imported here."""
