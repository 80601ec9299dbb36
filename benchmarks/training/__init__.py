"""The benchmark of training: S2-Attn against dense attention, VeRA against PEFT, plans beside measurements."""
