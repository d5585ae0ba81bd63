//! Bitmap transfer (§8).
