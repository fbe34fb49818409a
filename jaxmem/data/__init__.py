"""Sources, records, prompt formats, packing, mixing, the invented world."""
