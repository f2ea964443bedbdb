"""Files: replaced whole or not at all, opened safely, sealed by a checksum."""
