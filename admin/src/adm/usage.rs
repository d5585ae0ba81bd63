//! Help texts and the version of `drbdadm`, in the layout scripts and administrators know.

use palisade_conf::options;

use super::verbs::{Group, VERBS, Verb};
use crate::cli::Takes;

/// Version of the tools whose command line this is.
const STANDS_FOR: (u32, u32, u32) = (9, 34, 0);

const GENERAL: &str = "\
GENERAL OPTIONS:
  --stacked, -S
  --dry-run, -d
  --verbose, -v
  --config-file=..., -c ...
  --config-to-test=..., -t ...
  --config-to-exclude=..., -E ...
  --drbdsetup=..., -s ...
  --drbdmeta=..., -m ...
  --drbd-proxy-ctl=..., -p ...
  --sh-varname=..., -n ...
  --version, -V
  --setup-option=..., -W ...
  --help, -h
";

/// How to use a command, or the whole program.
pub fn usage(verb: Option<&Verb>) -> String {
    let name = verb.map_or("COMMAND", |verb| verb.name);
    let mut text = format!("\nUSAGE: drbdadm {name} [OPTION...] {{all|RESOURCE...}}\n\n{GENERAL}");
    match verb {
        Some(verb) => {
            let options = own_options(verb);
            if !options.is_empty() {
                text.push_str(&format!("\nOPTIONS FOR {}:\n{options}", verb.name));
            }
        }
        None => text.push_str(&format!("\nCOMMANDS:\n{}", two_columns(&[Group::Main]))),
    }
    let (a, b, c) = STANDS_FOR;
    text.push_str(&format!("\nVersion: {a}.{b}.{c} (api:2)\n{}\n", build_tag()));
    text
}

fn build_tag() -> String {
    format!("GIT-hash: palisade-{}", env!("CARGO_PKG_VERSION"))
}

/// The options of a command, a line each.
fn own_options(verb: &Verb) -> String {
    let flags = verb.accepts.flags.iter().map(|(name, takes)| (*name, *takes == Takes::Value));
    let classes = verb.accepts.classes.iter().flat_map(|class| options::of(*class));
    flags
        .chain(classes.map(|spec| (spec.name, !spec.is_bool())))
        .map(
            |(name, needs_value)| {
                if needs_value { format!("  --{name}=...\n") } else { format!("  --{name}[=...]\n") }
            },
        )
        .collect()
}

/// The commands of `hidden-commands`.
pub fn hidden_commands() -> String {
    format!(
        "\nThese additional commands might be useful for writing\nnifty shell scripts around drbdadm:\n\n{}\n\
         These commands are used by the kernel part of DRBD to\ninvoke user mode helper programs:\n\n{}\n\
         These commands ought to be used by experts and developers:\n\n{}\n",
        two_columns(&[Group::Script]),
        two_columns(&[Group::Handler]),
        two_columns(&[Group::Expert])
    )
}

/// Command names, sorted down the columns.
fn two_columns(groups: &[Group]) -> String {
    const WIDTH: usize = 35;
    let mut names: Vec<&str> =
        VERBS.iter().filter(|verb| groups.contains(&verb.group)).map(|verb| verb.name).collect();
    names.sort_unstable();
    let rows = names.len().div_ceil(2);
    let (left, right) = names.split_at(rows);
    let mut text = String::new();
    for (row, name) in left.iter().enumerate() {
        text.push_str(&format!(" {name:WIDTH$}"));
        if let Some(name) = right.get(row) {
            text.push_str(&format!(" {name:WIDTH$}"));
        }
        text.push('\n');
    }
    text
}

/// Shell assignments as the reference prints them; the version is that of the tools we stand in for.
pub fn version() -> String {
    let kernel = palisade_conf::BUNDLED_ENGINE;
    let (a, b, c) = STANDS_FOR;
    let code = |a: u32, b: u32, c: u32| a << 16 | b << 8 | c;
    format!(
        "DRBDADM_BUILDTAG={}\nDRBDADM_API_VERSION=2\nDRBD_KERNEL_VERSION_CODE=0x{:06x}\n\
         DRBD_KERNEL_VERSION={}.{}.{}\nDRBDADM_VERSION_CODE=0x{:06x}\nDRBDADM_VERSION={a}.{b}.{c}\n",
        build_tag().replace(": ", ":"),
        code(kernel.0, kernel.1, kernel.2),
        kernel.0,
        kernel.1,
        kernel.2,
        code(a, b, c),
    )
}
