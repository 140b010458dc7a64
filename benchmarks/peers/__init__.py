"""quantcli beside other tools, on the same models and the same calibration samples."""
