"""Stage 0: other people's files become records, and records are looked over before they cost."""
