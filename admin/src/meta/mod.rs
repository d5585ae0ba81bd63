//! `drbdmeta`: reads and writes metadata on disks that no engine has attached (`spec/metadata.md` §13).

mod create;
mod device;
mod existing;
mod gi;
mod repair;
mod superblock;

use std::io::Write as _;

use palisade_metadata::image::{self, BlockIo, Extent, ImageError};
use palisade_metadata::{
    DeviceFlags, DumpError, DumpHeader, Kind, Layout, Moved, PeerFlags, PeerSlot, Superblock, Version, dump,
    gi as show, parse_dump,
};

use crate::cli::{self, Accepts, Failure, Takes, print, scan, suggestion};
use crate::system::Local;
pub use device::remember_location;
use device::{Device, Question};

pub const EXIT_FAILED: i32 = 1;
pub const EXIT_ARGUMENT: i32 = 10;
pub const EXIT_USAGE: i32 = 20;
const EXIT_INCONSISTENT: i32 = 5;

const OPTIONS: Accepts = Accepts {
    flags: &[
        ("force", Takes::Switch),
        ("quiet", Takes::Switch),
        ("ignore-sanity-checks", Takes::Switch),
        ("node-id", Takes::Value),
        ("peer-max-bio-size", Takes::Value),
        ("al-stripes", Takes::Value),
        ("al-stripe-size-kB", Takes::Value),
        ("bitmap-block-size", Takes::Value),
        ("effective-size", Takes::Value),
        ("diskful-peers", Takes::Value),
        ("initial-current-uuid", Takes::Value),
        ("consistent", Takes::Switch),
        ("uptodate", Takes::Switch),
        ("tentative", Takes::Switch),
        ("output-format", Takes::Value),
    ],
    classes: &[],
    aliases: &[("dry-run", "tentative")],
};

/// Options of `create-md` alone.
const CREATE_ONLY: &[&str] = &[
    "peer-max-bio-size",
    "al-stripes",
    "al-stripe-size-kB",
    "bitmap-block-size",
    "effective-size",
    "diskful-peers",
    "initial-current-uuid",
    "consistent",
    "uptodate",
];

const SHORT: &[(&str, &str)] = &[
    ("-f", "--force"),
    ("-q", "--quiet"),
    ("-i", "--node-id"),
    ("-p", "--peer-max-bio-size"),
    ("-s", "--al-stripes"),
    ("-z", "--al-stripe-size-kB"),
    ("-B", "--bitmap-block-size"),
    ("-Z", "--effective-size"),
    ("-D", "--diskful-peers"),
    ("-o", "--output-format"),
];

/// How a command uses the device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Modify,
}

struct Verb {
    name: &'static str,
    access: Access,
    node_id: bool,
    run: fn(&mut Job) -> Result<i32, Failure>,
}

const VERBS: &[Verb] = &[
    Verb { name: "get-gi", access: Access::Read, node_id: true, run: gi::get },
    Verb { name: "show-gi", access: Access::Read, node_id: true, run: gi::show_frame },
    Verb { name: "set-gi", access: Access::Modify, node_id: true, run: gi::set },
    Verb { name: "dump-md", access: Access::Read, node_id: false, run: dump_md },
    Verb { name: "dump-superblock", access: Access::Read, node_id: false, run: superblock::dump_superblock },
    Verb {
        name: "hexdump-superblock",
        access: Access::Read,
        node_id: false,
        run: superblock::hexdump_superblock,
    },
    Verb { name: "restore-md", access: Access::Modify, node_id: false, run: restore_md },
    Verb { name: "verify-dump", access: Access::Read, node_id: false, run: verify_dump },
    Verb { name: "apply-al", access: Access::Modify, node_id: false, run: apply_al },
    Verb { name: "repair-md", access: Access::Modify, node_id: false, run: repair::repair_md },
    Verb { name: "wipe-md", access: Access::Modify, node_id: false, run: wipe_md },
    Verb { name: "outdate", access: Access::Modify, node_id: false, run: outdate },
    Verb { name: "invalidate", access: Access::Modify, node_id: false, run: invalidate },
    Verb { name: "dstate", access: Access::Read, node_id: false, run: dstate },
    Verb { name: "check-resize", access: Access::Modify, node_id: false, run: check_resize },
    Verb { name: "create-md", access: Access::Modify, node_id: false, run: create::create_md },
    Verb { name: "forget-peer", access: Access::Modify, node_id: true, run: forget_peer },
    Verb { name: "read-dev-uuid", access: Access::Read, node_id: false, run: read_dev_uuid },
    Verb { name: "write-dev-uuid", access: Access::Modify, node_id: false, run: write_dev_uuid },
];

/// A command with its device.
pub struct Job {
    pub minor: Option<u32>,
    pub device: Device,
    pub kind: Kind,
    pub version: Version,
    pub scanned: cli::Scanned,
    pub command_line: String,
    pub question: Question,
}

impl Job {
    /// Arguments behind the command word.
    pub fn argument(&self, index: usize) -> Option<&str> {
        const COMMAND_WORDS: usize = 5;
        self.scanned.words.get(COMMAND_WORDS + index).map(String::as_str)
    }

    pub fn node_id(&self) -> usize {
        self.scanned.flag("node-id").and_then(|n| n.parse().ok()).unwrap_or(0)
    }

    /// The superblock of the wanted version; `text` for stderr if there is none.
    pub fn superblock(&self, text: &str) -> Result<(Superblock, Layout), Failure> {
        match image::read_superblock(&self.device.file, self.kind, None) {
            Ok((sb, layout, _)) if sb.version == self.version => Ok((sb, layout)),
            Ok(_) | Err(ImageError::NoMetadata(_) | ImageError::Invalid(_)) => {
                Err(Failure::new(EXIT_FAILED, text))
            }
            Err(e) => Err(Failure::new(EXIT_ARGUMENT, format!("{}: {e}", self.device.path))),
        }
    }

    /// Writes the superblock durably and remembers where it is.
    pub fn store(&self, layout: &Layout, superblock: &Superblock) -> Result<(), Failure> {
        image::write_superblock(&self.device.file, layout, superblock)
            .and_then(|()| {
                self.device.file.flush().map_err(|source| ImageError::Io {
                    what: "superblock",
                    action: "flushed",
                    pos: layout.md_offset,
                    source,
                })
            })
            .map_err(|e| self.io_failure(&e))?;
        self.remember(superblock.device_uuid);
        Ok(())
    }

    /// Keeps the place of internal metadata for the day the device has grown. Not being able to is no
    /// reason to fail.
    pub fn remember(&self, device_uuid: u64) {
        let (Some(minor), Kind::Internal) = (self.minor, self.kind) else { return };
        let uuid = Some(device_uuid).filter(|u| *u != 0);
        if let Err(e) = remember_location(minor, &self.device.path, self.device.bytes, uuid) {
            eprintln!("cannot remember the place of the metadata of minor {minor}: {e}");
        }
    }

    pub fn io_failure(&self, e: &ImageError) -> Failure {
        Failure::new(EXIT_ARGUMENT, format!("{}: {e}", self.device.path))
    }
}

/// Runs `drbdmeta` with these arguments; prints and gives the exit status.
pub fn main(args: &[String]) -> i32 {
    run(args).unwrap_or_else(|f| f.report())
}

fn run(args: &[String]) -> Result<i32, Failure> {
    let long: Vec<String> = args.iter().map(|a| long_form(a)).collect();
    let scanned = match scan(&long, &OPTIONS) {
        Ok(scanned) => scanned,
        Err(_) if long.iter().any(|a| a == "--help" || a == "-h") => {
            print(&usage());
            return Ok(0);
        }
        Err(e) => {
            print(&usage());
            return Err(Failure::new(EXIT_USAGE, format!("drbdmeta: {e}")));
        }
    };
    const WORDS_MIN: usize = 3;
    if scanned.words.len() < WORDS_MIN {
        print(&usage());
        return Ok(EXIT_USAGE);
    }
    let usage_error = |text: String| Failure::new(EXIT_USAGE, text);
    let word = |i: usize| scanned.words.get(i).map(String::as_str);
    let version = match word(1).unwrap_or_default() {
        "v08" => Version::V08,
        "v09" => Version::V09,
        known @ ("v06" | "v07") => {
            return Err(usage_error(format!(
                "not supported by the bundled engine yet: metadata format {known}"
            )));
        }
        other => return Err(usage_error(format!("Unknown format '{other}'."))),
    };
    let (Some(path), Some(index)) = (word(2), word(3)) else {
        return Err(usage_error("Too few arguments for format".to_owned()));
    };
    let kind =
        kind_of(index).ok_or_else(|| usage_error(format!("'{index}' is not a valid index number.")))?;
    let Some(command) = word(4) else { return Err(usage_error("command missing".to_owned())) };
    let Some(verb) = VERBS.iter().find(|v| v.name == command) else {
        let hint = suggestion(command, VERBS.iter().map(|v| v.name));
        return Err(usage_error(format!("Unknown command '{command}'.{hint}")));
    };
    check_options(verb, version, &scanned)?;
    let minor = minor_of(word(0).unwrap_or_default())?;
    let _lock = minor.map(device::lock_minor).transpose()?;
    let attached = match minor {
        Some(minor) => device::is_attached(minor)?,
        None => false,
    };
    if attached && verb.access == Access::Modify {
        let device = word(0).unwrap_or_default();
        return Err(usage_error(format!("Device '{device}' is configured!")));
    }
    let question = Question { force: scanned.is_set("force"), quiet: scanned.is_set("quiet") };
    // These run unattended, before an attach.
    let never_ask = matches!(verb.name, "apply-al" | "repair-md");
    let device = Device::open(path, kind, verb.access == Access::Read, never_ask, question)?;
    let mut words = vec!["drbdmeta".to_owned()];
    words.extend(args.iter().cloned());
    let mut job = Job { minor, device, kind, version, scanned, command_line: words.join(" "), question };
    let code = (verb.run)(&mut job)?;
    if let (true, Some(minor)) = (attached, minor) {
        eprintln!("# Output might be stale, since minor {minor} is attached");
    }
    Ok(code)
}

fn long_form(arg: &str) -> String {
    SHORT
        .iter()
        .find(|(short, _)| *short == arg)
        .map_or_else(|| arg.to_owned(), |(_, long)| (*long).to_owned())
}

fn minor_of(word: &str) -> Result<Option<u32>, Failure> {
    if word == "-" {
        return Ok(None);
    }
    crate::setup::minor_of(word).map(Some).ok_or_else(|| {
        Failure::new(EXIT_USAGE, format!("Cannot determine minor device number of device '{word}'"))
    })
}

fn kind_of(index: &str) -> Option<Kind> {
    const INDEX_MAX: u32 = 255;
    match index {
        "internal" | "flex-internal" => Some(Kind::Internal),
        "flex-external" | "flexible" => Some(Kind::FlexExternal),
        n => n.parse().ok().filter(|n| *n <= INDEX_MAX).map(Kind::Indexed),
    }
}

fn check_options(verb: &Verb, version: Version, scanned: &cli::Scanned) -> Result<(), Failure> {
    const NODE_ID_MAX: u32 = 31;
    let wrong = |text: String| Err(Failure::new(EXIT_ARGUMENT, text));
    let name = verb.name;
    let al = |n: &str| name == "restore-md" && n.starts_with("al-stripe");
    if name != "create-md"
        && let Some((option, _)) =
            scanned.flags.iter().find(|(n, _)| CREATE_ONLY.contains(&n.as_str()) && !al(n))
    {
        return wrong(format!("The --{option} option is only allowed with create-md"));
    }
    if name != "repair-md" && scanned.is_set("tentative") {
        return wrong("The --tentative option is only allowed with repair-md".to_owned());
    }
    if name != "dump-superblock" && scanned.flag("output-format").is_some() {
        return wrong("The --output-format option is only allowed with dump-superblock".to_owned());
    }
    match scanned.flag("node-id") {
        Some(_) if !verb.node_id => wrong(format!("The {name} command does not accept the --node-id option")),
        Some(text) if text.parse::<u32>().is_ok_and(|n| n <= NODE_ID_MAX) => Ok(()),
        Some(_) => wrong(format!("node-id out of range (0...{NODE_ID_MAX})")),
        None if verb.node_id && version == Version::V09 => {
            wrong(format!("The {name} command requires the --node-id option"))
        }
        None => Ok(()),
    }
}

fn usage() -> String {
    let mut text = String::from(
        "\nUSAGE: drbdmeta [--force] DEVICE FORMAT [FORMAT ARGS...] COMMAND [CMD ARGS...]\n\nFORMATS:\n  \
         v08 device index\n  v09 device index\n\nCOMMANDS:\n",
    );
    for verb in VERBS {
        let argument = match verb.name {
            "create-md" => {
                "[--peer-max-bio-size {val}] [--al-stripes {val}] [--al-stripe-size-kB {val}] {max_peers}"
            }
            "restore-md" | "verify-dump" => "file",
            _ if verb.node_id => "--node-id {val} ",
            _ => "",
        };
        text.push_str(&format!("  {} {argument}\n", verb.name));
    }
    text
}

const NO_METADATA: &str = "No valid meta data found";

fn dump_md(job: &mut Job) -> Result<i32, Failure> {
    let moved_from = device::last_known_bytes(job);
    let read = image::read_metadata(&job.device.file, job.kind, None, Extent::Padded);
    let (md, moved) = match (read, moved_from) {
        (Ok(md), _) if md.superblock.version == job.version => (md, None),
        (Ok(_) | Err(ImageError::NoMetadata(_) | ImageError::Invalid(_)), Some(last_bytes)) => {
            let md = image::read_moved(&job.device.file, last_bytes, Extent::Padded)
                .map_err(|_| Failure::new(EXIT_FAILED, NO_METADATA))?;
            (md, Some(last_bytes))
        }
        (Ok(_) | Err(ImageError::NoMetadata(_) | ImageError::Invalid(_)), None) => {
            return Err(Failure::new(EXIT_FAILED, NO_METADATA));
        }
        (Err(e), _) => return Err(job.io_failure(&e)),
    };
    let mut superblock = md.superblock;
    superblock.effective_size_sectors = md.clamped_from.unwrap_or(superblock.effective_size_sectors);
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
            expected_md_offset: palisade_metadata::md_offset(Kind::Internal, job.device.bytes).unwrap_or(0),
        }),
    };
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    dump(&mut out, &header, &superblock, &md.layout, &md.bitmap, job.question.force)
        .and_then(|()| out.flush().map_err(DumpError::Write))
        .map_err(|e| Failure::new(EXIT_FAILED, e.to_string()))?;
    Ok(0)
}

/// Text of the dump named first, or of stdin.
fn dump_text(job: &Job) -> Result<String, Failure> {
    const DUMP_BYTES_MAX: u64 = 1 << 30;
    let mut text = String::new();
    let failed = |name: &str| Failure::new(EXIT_USAGE, format!("open of '{name}' failed."));
    let result = match job.argument(0) {
        Some(name) => {
            let file = std::fs::File::open(name).map_err(|_| failed(name))?;
            std::io::Read::read_to_string(&mut std::io::Read::take(file, DUMP_BYTES_MAX), &mut text)
        }
        None => {
            let input = std::io::stdin().lock();
            std::io::Read::read_to_string(&mut std::io::Read::take(input, DUMP_BYTES_MAX), &mut text)
        }
    };
    result.map_err(|e| Failure::new(EXIT_ARGUMENT, format!("The dump cannot be read: {e}.")))?;
    Ok(text)
}

fn verify_dump(job: &mut Job) -> Result<i32, Failure> {
    parse_dump(&dump_text(job)?, job.version).map_err(|e| Failure::new(EXIT_ARGUMENT, e.to_string()))?;
    print("input file parsed ok\n");
    Ok(0)
}

fn restore_md(job: &mut Job) -> Result<i32, Failure> {
    let parsed =
        parse_dump(&dump_text(job)?, job.version).map_err(|e| Failure::new(EXIT_ARGUMENT, e.to_string()))?;
    if image::read_superblock(&job.device.file, job.kind, None).is_ok()
        && !job.question.ask(&[], "Valid meta-data in place, overwrite?")
    {
        print("Operation canceled.\n");
        return Ok(EXIT_FAILED);
    }
    let geometry = create::al_geometry(job)?;
    eprintln!("reinitializing");
    image::restore_md(&job.device.file, job.kind, None, geometry, &parsed).map_err(|e| job.io_failure(&e))?;
    if let Ok((sb, _)) = job.superblock("") {
        job.remember(sb.device_uuid);
    }
    print("Successfully restored meta data\n");
    Ok(0)
}

fn apply_al(job: &mut Job) -> Result<i32, Failure> {
    let (superblock, _) = job.superblock(NO_METADATA)?;
    let primary = superblock.flags.contains(DeviceFlags::PRIMARY_IND);
    let (applied, md) = image::apply_al(&job.device.file, job.kind, None).map_err(|e| match &e {
        ImageError::Apply(_) => Failure::new(EXIT_FAILED, e.to_string()),
        _ => job.io_failure(&e),
    })?;
    job.remember(md.superblock.device_uuid);
    if !primary {
        return Ok(0);
    }
    const KIB: u64 = 1024;
    if applied.marked_bits > 0 {
        let size = show::pretty_kib(applied.marked_bytes / KIB);
        eprintln!("Marked additional {size} as out-of-sync based on AL.");
    } else {
        eprintln!("Nothing to do.");
    }
    if applied.ignored.is_some() {
        eprintln!("Error ignored, no need to apply the AL");
    }
    Ok(0)
}

fn wipe_md(job: &mut Job) -> Result<i32, Failure> {
    if job.superblock("").is_err() {
        eprintln!("There appears to be no drbd meta data to wipe out?");
        return Ok(0);
    }
    if !job.question.ask(&[], "Do you really want to wipe out the DRBD meta data?") {
        print("Operation cancelled.\n");
        return Ok(EXIT_FAILED);
    }
    print("Wiping meta data...\n");
    image::wipe_md(&job.device.file, job.kind).map_err(|e| job.io_failure(&e))?;
    if let Some(minor) = job.minor {
        device::forget_location(minor);
    }
    print("DRBD meta data block successfully wiped out.\n");
    Ok(0)
}

fn outdate(job: &mut Job) -> Result<i32, Failure> {
    let (mut superblock, layout) = job.superblock("")?;
    if !superblock.flags.contains(DeviceFlags::CONSISTENT) {
        return Err(Failure::new(EXIT_INCONSISTENT, "Device is inconsistent."));
    }
    superblock.flags.set(DeviceFlags::WAS_UP_TO_DATE, false);
    job.store(&layout, &superblock)?;
    Ok(0)
}

fn invalidate(job: &mut Job) -> Result<i32, Failure> {
    let (mut superblock, layout) = job.superblock("")?;
    superblock.flags.set(DeviceFlags::CONSISTENT, false);
    superblock.flags.set(DeviceFlags::WAS_UP_TO_DATE, false);
    match superblock.version {
        Version::V08 => {
            superblock.flags.set(DeviceFlags::FULL_SYNC, true);
        }
        Version::V09 => {
            for peer in &mut superblock.peers {
                peer.flags.set(PeerFlags::FULL_SYNC, true);
            }
        }
    }
    job.store(&layout, &superblock)?;
    Ok(0)
}

fn dstate(job: &mut Job) -> Result<i32, Failure> {
    let (superblock, _) = job.superblock(NO_METADATA)?;
    print(&format!("{}\n", show::dstate(&superblock)));
    Ok(0)
}

fn check_resize(job: &mut Job) -> Result<i32, Failure> {
    if job.kind != Kind::Internal {
        return Err(Failure::new(EXIT_FAILED, "Operation only supported for >= v8 internal meta data"));
    }
    if let Ok((superblock, _)) = job.superblock("") {
        job.remember(superblock.device_uuid);
        return Ok(0);
    }
    let last = device::last_known_bytes(job)
        .filter(|last| image::read_moved(&job.device.file, *last, Extent::Exact).is_ok())
        .ok_or_else(|| Failure::new(EXIT_FAILED, "no suitable meta data found :("))?;
    eprintln!("Moving the internal meta data to its proper location");
    let (superblock, _) = image::move_internal(&job.device.file, last).map_err(|e| job.io_failure(&e))?;
    job.remember(superblock.device_uuid);
    print("Internal drbd meta data successfully moved.\nOld meta data region zeroed.\n");
    Ok(0)
}

/// Frees the slot of a node; its bitmap UUID becomes the day-0 one, so that a new node starts there.
fn forget_peer(job: &mut Job) -> Result<i32, Failure> {
    let (mut superblock, layout) = job.superblock(NO_METADATA)?;
    if superblock.version == Version::V08 {
        return Err(Failure::new(EXIT_USAGE, "The forget-peer command needs v09 metadata"));
    }
    let node_id = job.node_id();
    let own = usize::try_from(superblock.node_id).ok();
    let day0 = superblock
        .peers
        .iter()
        .enumerate()
        .rev()
        .find(|(id, p)| Some(*id) != own && *id != node_id && p.is_day0())
        .map(|(_, p)| *p)
        .unwrap_or_default();
    let Some(slot) = superblock.peers.get_mut(node_id) else {
        return Err(Failure::new(EXIT_ARGUMENT, format!("There is no entry for node id {node_id}.")));
    };
    if slot.slot().is_some() {
        eprintln!("Setting all bits in slot {} not implemented.", slot.bitmap_index);
        eprintln!("Do it with dump-md, edit, restore-md");
    }
    *slot = PeerSlot { bitmap_uuid: day0.bitmap_uuid, bitmap_dagtag: day0.bitmap_dagtag, ..PeerSlot::EMPTY };
    job.store(&layout, &superblock)?;
    Ok(0)
}

fn read_dev_uuid(job: &mut Job) -> Result<i32, Failure> {
    let (superblock, _) = job.superblock("")?;
    print(&format!("{:016X}\n", superblock.device_uuid));
    Ok(0)
}

fn write_dev_uuid(job: &mut Job) -> Result<i32, Failure> {
    let text = job.argument(0).ok_or_else(|| Failure::new(EXIT_ARGUMENT, "Required Argument missing"))?;
    let uuid = gi::uuid(text)
        .ok_or_else(|| Failure::new(EXIT_ARGUMENT, format!("'{text}' is not a hexadecimal number.")))?;
    let (mut superblock, layout) = job.superblock("")?;
    superblock.device_uuid = uuid;
    job.store(&layout, &superblock)?;
    Ok(0)
}

/// The device UUID that `read-dev-uuid` with these arguments would print.
pub fn device_uuid(args: &[String]) -> Result<Option<u64>, Failure> {
    let (Some(path), Some(kind)) = (args.get(2), args.get(3).and_then(|i| kind_of(i))) else {
        return Ok(None);
    };
    let question = Question { force: false, quiet: true };
    let device = Device::open(path, kind, true, true, question)?;
    Ok(image::read_superblock(&device.file, kind, None).ok().map(|(sb, ..)| sb.device_uuid))
}
