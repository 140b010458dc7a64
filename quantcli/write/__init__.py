"""Writers: one file per output, all with the same verb: write(QuantizedModel) → the output's model or bytes."""
