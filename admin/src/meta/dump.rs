//! Text dumps: `dump-md`, `restore-md`, `verify-dump` (`spec/metadata.md` §12).

use std::io::{Read as _, Write as _};

use palisade_metadata::image::{self, Extent, ImageError};
use palisade_metadata::{
    DumpError, DumpHeader, Kind, Moved, ParsedDump, Version, dump, md_offset, parse_dump,
};

use super::job::report_clamp;
use super::{EXIT_ARGUMENT, EXIT_FAILED, EXIT_USAGE, Job, NO_METADATA, changes, log_text, sanity};
use crate::cli::{Failure, print};
use crate::system::Local;

pub fn dump_md(job: &mut Job) -> Result<i32, Failure> {
    let moved = if job.probe()?.is_some() { None } else { job.last_known_bytes() };
    let md = match moved {
        Some(last_bytes) => image::read_moved(&job.device.file, last_bytes, Extent::Padded),
        None => image::read_metadata(&job.device.file, job.kind, None, Extent::Padded),
    };
    let md = match md {
        Ok(md) if md.superblock.version == job.version => md,
        Ok(_) | Err(ImageError::NoMetadata(_) | ImageError::Invalid(_)) => {
            return Err(Failure::new(EXIT_FAILED, NO_METADATA));
        }
        Err(e) => return Err(job.io_failure(&e)),
    };
    report_clamp(md.clamped_from, &md.superblock);
    let seconds =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let date = format!("{} [{seconds}]", Local::at(seconds).spaced());
    let host = nix::unistd::gethostname().map(|h| h.to_string_lossy().into_owned()).unwrap_or_default();
    let header = DumpHeader {
        date: &date,
        host: &host,
        command: &job.command_line,
        moved: moved.map(|last_bytes| Moved {
            device: &job.device.path,
            current_bytes: job.device.bytes,
            last_bytes,
            expected_md_offset: md_offset(Kind::Internal, job.device.bytes).unwrap_or(0),
        }),
    };
    if job.question.force && !md.superblock.is_clean() {
        eprintln!("{}", DumpError::Unclean);
    }
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    const ALL: usize = 10;
    let log = job.verbose() >= ALL;
    dump(&mut out, &header, &md.superblock, &md.layout, &md.bitmap, job.question.force)
        .and_then(
            |()| if log { Ok(log_text::write(&mut out, &job.device.file, &md.layout)?) } else { Ok(()) },
        )
        .and_then(|()| Ok(out.flush()?))
        .map_err(|e| Failure::new(EXIT_FAILED, e.to_string()))?;
    Ok(0)
}

/// The dump in that file, or on stdin.
fn read_dump(name: Option<&str>, version: Version) -> Result<ParsedDump, Failure> {
    const DUMP_BYTES_MAX: u64 = 1 << 30;
    let wrong = |text: String| Failure::new(EXIT_ARGUMENT, text);
    let mut text = String::new();
    let read = match name {
        Some(name) => std::fs::File::open(name)
            .map_err(|_| Failure::new(EXIT_USAGE, format!("open of '{name}' failed.")))?
            .take(DUMP_BYTES_MAX)
            .read_to_string(&mut text),
        None => std::io::stdin().lock().take(DUMP_BYTES_MAX).read_to_string(&mut text),
    };
    read.map_err(|e| wrong(format!("The dump cannot be read: {e}.")))?;
    parse_dump(&text, version).map_err(|e| wrong(e.to_string()))
}

/// Looks at the file alone.
pub fn verify_dump(name: Option<&str>, version: Version) -> Result<i32, Failure> {
    read_dump(name, version)?;
    print("input file parsed ok\n");
    Ok(0)
}

pub fn restore_md(job: &mut Job) -> Result<i32, Failure> {
    let parsed = read_dump(job.argument(0), job.version)?;
    let log = changes::al_geometry(job)?;
    if job.probe()?.is_some() && !job.question.ask(&[], "Valid meta-data in place, overwrite?") {
        return Ok(EXIT_FAILED);
    }
    let (_, layout, _) =
        image::restored(&job.device.file, job.kind, None, log, &parsed).map_err(|e| job.io_failure(&e))?;
    eprintln!("reinitializing");
    if let Some(code) = sanity::check_existing_data(job, &layout)? {
        return Ok(code);
    }
    let md =
        image::restore_md(&job.device.file, job.kind, None, log, &parsed).map_err(|e| job.io_failure(&e))?;
    report_clamp(md.clamped_from, &md.superblock);
    if parsed.reaches_beyond(&md.bitmap) {
        eprintln!("Bitmap info too large, truncated!");
    }
    job.remember(md.superblock.device_uuid);
    print("Successfully restored meta data\n");
    Ok(0)
}
