"""Commands that read a checkpoint without running it: inspect, verify, plan, card."""
