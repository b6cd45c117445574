"""The ops of TailorKV: one contract each, with their implementations side by side."""
