//! `drbdmeta`: reads and writes metadata on disks that no engine has attached (`spec/metadata.md` §13).

mod changes;
mod create;
mod device;
mod dump;
mod existing;
mod gi;
mod job;
mod log_text;
mod note;
mod peers;
mod resize;
mod sanity;
mod state;
mod superblock;

use palisade_metadata::image;
use palisade_metadata::{Kind, Version};

use crate::cli::{self, Accepts, Failure, Takes, print, scan, suggestion};
use device::{Device, Opening, Question};
use job::Job;
pub use note::remember_location;

const EXIT_FAILED: i32 = 1;
const EXIT_ARGUMENT: i32 = 10;
const EXIT_USAGE: i32 = 20;

const OPTIONS: Accepts = Accepts {
    flags: &[
        ("force", Takes::Switch),
        ("quiet", Takes::Switch),
        ("verbose", Takes::Switch),
        ("ignore-sanity-checks", Takes::Switch),
        ("node-id", Takes::Value),
        ("peer-max-bio-size", Takes::Value),
        ("al-stripes", Takes::Value),
        ("al-stripe-size-kB", Takes::Value),
        ("bitmap-block-size", Takes::Value),
        ("initialize-bitmap", Takes::Value),
        ("effective-size", Takes::Value),
        ("diskful-peers", Takes::Value),
        ("initial-current-uuid", Takes::Value),
        ("consistent", Takes::Switch),
        ("uptodate", Takes::Switch),
        ("peers-outdated", Takes::Switch),
        ("rotate-uuids", Takes::Switch),
        ("tentative", Takes::Switch),
        ("output-format", Takes::Value),
        ("var-lib-drbd", Takes::Value),
    ],
    classes: &[],
    aliases: &[("dry-run", "tentative")],
};

/// Options that only some commands take.
const ONLY: &[(&str, &[&str])] = &[
    ("peer-max-bio-size", &["create-md"]),
    ("al-stripes", &["create-md", "restore-md"]),
    ("al-stripe-size-kB", &["create-md", "restore-md"]),
    ("bitmap-block-size", &["create-md"]),
    ("initialize-bitmap", &["create-md", "check-resize"]),
    ("effective-size", &["create-md"]),
    ("diskful-peers", &["create-md"]),
    ("initial-current-uuid", &["create-md"]),
    ("consistent", &["create-md"]),
    ("uptodate", &["create-md"]),
    ("peers-outdated", &["create-md"]),
    ("rotate-uuids", &["create-md"]),
    ("output-format", &["dump-superblock"]),
];

/// Options about what v08 does not have.
const V09_ONLY: &[&str] = &[
    "bitmap-block-size",
    "diskful-peers",
    "initial-current-uuid",
    "consistent",
    "uptodate",
    "peers-outdated",
    "rotate-uuids",
];

const SHORT: &[(&str, &str)] = &[
    ("-f", "--force"),
    ("-q", "--quiet"),
    ("-v", "--verbose"),
    ("-i", "--node-id"),
    ("-p", "--peer-max-bio-size"),
    ("-s", "--al-stripes"),
    ("-z", "--al-stripe-size-kB"),
    ("-B", "--bitmap-block-size"),
    ("-b", "--initialize-bitmap"),
    ("-Z", "--effective-size"),
    ("-D", "--diskful-peers"),
    ("-o", "--output-format"),
];

/// What a command works on.
#[derive(Clone, Copy)]
enum Work {
    /// A dump, without any device.
    File(fn(Option<&str>, Version) -> Result<i32, Failure>),
    Read(fn(&mut Job) -> Result<i32, Failure>),
    Modify(fn(&mut Job) -> Result<i32, Failure>),
}

use Work::{File, Modify, Read};

/// Name, arguments as the usage text shows them (`None`: not listed there), work.
const VERBS: &[(&str, Option<&str>, Work)] = &[
    ("get-gi", Some("--node-id {val} "), Read(gi::get)),
    ("show-gi", Some("--node-id {val} "), Read(gi::show_frame)),
    ("dump-md", Some(""), Read(dump::dump_md)),
    ("dump-superblock", Some("[--output-format={binary,hex,json}]"), Read(superblock::dump_superblock)),
    ("hexdump-superblock", Some(""), Read(superblock::hexdump_superblock)),
    ("restore-md", Some("file"), Modify(dump::restore_md)),
    ("verify-dump", Some("file"), File(dump::verify_dump)),
    ("apply-al", Some(""), Modify(state::apply_al)),
    ("wipe-md", Some(""), Modify(state::wipe_md)),
    ("outdate", Some(""), Modify(state::outdate)),
    ("invalidate", Some(""), Modify(state::invalidate)),
    ("dstate", Some(""), Read(state::dstate)),
    ("check-resize", Some(""), Modify(resize::check_resize)),
    (
        "create-md",
        Some(
            "[--effective-size {val}] [--diskful-peers {val}] [--peer-max-bio-size {val}] \
             [--al-stripes {val}] [--al-stripe-size-kB {val}] [--bitmap-block-size {val}] {max_peers}",
        ),
        Modify(create::create_md),
    ),
    ("forget-peer", Some("--node-id {val} "), Modify(peers::forget_peer)),
    ("repair-md", Some("[--tentative]"), Modify(peers::repair_md)),
    ("set-gi", None, Modify(gi::set)),
    ("read-dev-uuid", None, Read(state::read_dev_uuid)),
    ("write-dev-uuid", None, Modify(state::write_dev_uuid)),
];

/// Commands about one node.
const NODE_ID: &[&str] = &["get-gi", "show-gi", "set-gi", "forget-peer"];

const NO_METADATA: &str = "No valid meta data found";

/// Runs `drbdmeta` with these arguments; prints and gives the exit status.
pub fn main(args: &[String]) -> i32 {
    run(args).unwrap_or_else(|f| f.report())
}

fn run(args: &[String]) -> Result<i32, Failure> {
    let long: Vec<String> = args.iter().flat_map(|a| long_forms(a)).collect();
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
                "The format {known} is that of DRBD before 8.0 and is not supported: convert it to v08 with \
                 the tools it came with."
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
    let Some((name, _, work)) = VERBS.iter().find(|(name, ..)| *name == command) else {
        let hint = suggestion(command, VERBS.iter().map(|(name, ..)| *name));
        return Err(usage_error(format!("Unknown command '{command}'.{hint}")));
    };
    check_options(name, version, &scanned)?;
    let minor = minor_of(word(0).unwrap_or_default())?;
    let (work, read_only) = match work {
        File(work) => return work(word(5), version),
        Read(work) => (work, true),
        Modify(work) => (work, false),
    };
    let _lock = minor.map(device::lock_minor).transpose()?;
    let attached = match minor {
        Some(minor) => device::is_attached(minor)?,
        None => false,
    };
    if attached && !read_only {
        let device = word(0).unwrap_or_default();
        return Err(usage_error(format!("Device '{device}' is configured!")));
    }
    let question =
        Question { force: scanned.is_set("force"), quiet: scanned.is_set("quiet"), ..Question::default() };
    let how = Opening {
        read_only,
        // These run unattended, before an attach.
        never_ask: matches!(*name, "apply-al" | "repair-md"),
        dry_run: scanned.is_set("tentative"),
        verbose: scanned.count("verbose") > 1,
    };
    let device = Device::open(path, kind, how, &question)?;
    let mut words = vec!["drbdmeta".to_owned()];
    words.extend(args.iter().cloned());
    let note = note::Note::of(scanned.flag("var-lib-drbd"), minor);
    let mut job = Job { note, device, kind, version, scanned, command_line: words.join(" "), question };
    let done = work(&mut job);
    if let (true, Some(minor)) = (attached, minor) {
        eprintln!("# Output might be stale, since minor {minor} is attached");
    }
    let suppressed = job.question.suppressed.get();
    if suppressed > 0 {
        eprintln!("# --force --quiet: {suppressed} confirmation(s) suppressed and auto-confirmed");
    }
    done
}

/// `-x`, `-x VALUE`, `-xVALUE` and switches in one word, `-xyz`, as long options.
fn long_forms(arg: &str) -> Vec<String> {
    let known = SHORT.iter().find_map(|(short, long)| Some((*long, arg.strip_prefix(short)?)));
    let Some((long, rest)) = known else { return vec![arg.to_owned()] };
    let switch = OPTIONS.flags.contains(&(long.trim_start_matches('-'), Takes::Switch));
    match rest {
        "" => vec![long.to_owned()],
        more if switch => {
            let mut all = vec![long.to_owned()];
            all.extend(long_forms(&format!("-{more}")));
            all
        }
        value => vec![format!("{long}={value}")],
    }
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

fn check_options(name: &str, version: Version, scanned: &cli::Scanned) -> Result<(), Failure> {
    const NODE_ID_MAX: u32 = 31;
    let wrong = |text: String| Err(Failure::new(EXIT_ARGUMENT, text));
    let given = |option: &str| scanned.flags.iter().any(|(n, value)| n == option && value != "no");
    if let Some((option, verbs)) = ONLY.iter().find(|(o, verbs)| given(o) && !verbs.contains(&name)) {
        let verbs = verbs.join(" and ");
        return wrong(format!("The --{option} option is only allowed with {verbs}"));
    }
    if version == Version::V08
        && let Some(option) = V09_ONLY.iter().find(|o| given(o))
    {
        return wrong(format!("The --{option} option is only allowed with v09"));
    }
    let wanted = NODE_ID.contains(&name);
    match scanned.flag("node-id") {
        Some(_) if !wanted => wrong(format!("The {name} command does not accept the --node-id option")),
        Some(text) if text.parse::<u32>().is_ok_and(|n| n <= NODE_ID_MAX) => {
            if version == Version::V08 && text != "0" {
                eprintln!("Not v09, implicitly set --node-id = 0");
            }
            Ok(())
        }
        Some(_) => wrong(format!("node-id out of range (0...{NODE_ID_MAX})")),
        None if wanted && version == Version::V09 => {
            wrong(format!("The {name} command requires the --node-id option"))
        }
        None => Ok(()),
    }
}

fn usage() -> String {
    let mut text = String::from(
        "\nUSAGE: drbdmeta [--force] [--quiet] DEVICE FORMAT [FORMAT ARGS...] COMMAND [CMD ARGS...]\n\n\
         FORMATS:\n  v08 device index\n  v09 device index\n\nCOMMANDS:\n",
    );
    for (name, arguments, _) in VERBS {
        if let Some(arguments) = arguments {
            text.push_str(&format!("  {name} {arguments}\n"));
        }
    }
    text
}

/// The device UUID that `read-dev-uuid` with these arguments would print.
pub fn device_uuid(args: &[String]) -> Result<Option<u64>, Failure> {
    let (Some(path), Some(kind)) = (args.get(2), args.get(3).and_then(|i| kind_of(i))) else {
        return Ok(None);
    };
    let question = Question { quiet: true, ..Question::default() };
    let how = Opening { read_only: true, never_ask: true, dry_run: false, verbose: false };
    let device = Device::open(path, kind, how, &question)?;
    Ok(image::read_superblock(&device.file, kind, None).ok().map(|(sb, ..)| sb.device_uuid))
}
