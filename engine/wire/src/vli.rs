//! RLE-VLI code (§8.3).
