//! The table of verbs and the ones that change something.

use palisade_conf::options::{self, Canonical, Class};
use palisade_control::{Command, Endpoint, MetaIndex, Refusal, code};

use super::{Call, EXIT_USAGE, events, hand_over, order, query, resource_of_minor, wait};
use crate::cli::{Accepts, Failure, Flag, Takes};
use crate::engines::{self, Server};

/// A verb: its words (optional ones in brackets) and options.
pub struct Verb {
    pub name: &'static str,
    pub words: &'static [&'static str],
    pub accepts: Accepts,
    pub run: fn(&Call<'_>) -> Result<i32, Failure>,
}

const fn accepts(flags: &'static [Flag], classes: &'static [Class]) -> Accepts {
    Accepts { flags, classes, aliases: &[] }
}

const NONE: Accepts = accepts(&[], &[]);
const FORCE: Accepts = accepts(&[("force", Takes::Switch)], &[]);
const SET_DEFAULTS: &[Flag] = &[("set-defaults", Takes::Switch)];
const R: &[&str] = &["resource"];
const R_N: &[&str] = &["resource", "peer_node_id"];
const R_N_V: &[&str] = &["resource", "peer_node_id", "volume"];
const M: &[&str] = &["minor"];
const PATH: &[&str] = &["resource", "peer_node_id", "local-addr", "remote-addr"];
const WAIT: &[Class] = &[Class::Startup];

const fn verb(
    name: &'static str,
    words: &'static [&'static str],
    accepts: Accepts,
    run: fn(&Call<'_>) -> Result<i32, Failure>,
) -> Verb {
    Verb { name, words, accepts, run }
}

pub const VERBS: &[Verb] = &[
    verb(
        "primary",
        R,
        Accepts {
            flags: &[("force", Takes::Switch)],
            classes: &[],
            aliases: &[("overwrite-data-of-peer", "force")],
        },
        |c| resource(c, |c| Ok(Command::Primary { force: c.scanned.is_set("force") })),
    ),
    verb("secondary", R, FORCE, |c| {
        resource(c, |c| Ok(Command::Secondary { force: c.scanned.is_set("force") }))
    }),
    verb(
        "attach",
        &["minor", "lower_dev", "meta_data_dev", "meta_data_index"],
        accepts(&[], &[Class::Attach]),
        |c| {
            minor(c, |c, minor| {
                Ok(Command::Attach {
                    minor,
                    backing_device: absolute(c.word(1)),
                    meta_device: absolute(c.word(2)),
                    meta_index: c.word(3).parse::<MetaIndex>().map_err(|e| Failure::new(EXIT_USAGE, e))?,
                    options: c.scanned.options.clone(),
                })
            })
        },
    ),
    verb("disk-options", M, accepts(SET_DEFAULTS, &[Class::Attach]), |c| {
        minor(c, |c, minor| {
            Ok(Command::DiskOptions {
                minor,
                options: c.scanned.options.clone(),
                set_defaults: c.scanned.is_set("set-defaults"),
            })
        })
    }),
    verb("detach", M, accepts(&[("force", Takes::Switch), ("diskless", Takes::Switch)], &[]), |c| {
        minor(c, |c, minor| {
            Ok(Command::Detach {
                minor,
                force: c.scanned.is_set("force"),
                diskless: c.scanned.is_set("diskless"),
            })
        })
    }),
    verb(
        "connect",
        R_N,
        Accepts {
            flags: &[("tentative", Takes::Switch), ("discard-my-data", Takes::Switch)],
            classes: &[],
            aliases: &[("dry-run", "tentative")],
        },
        |c| {
            peer(c, |c, peer_node_id| {
                Ok(Command::Connect {
                    peer_node_id,
                    discard_my_data: c.scanned.is_set("discard-my-data"),
                    tentative: c.scanned.is_set("tentative"),
                })
            })
        },
    ),
    verb("new-peer", R_N, accepts(&[], &[Class::Net]), |c| {
        peer(c, |c, peer_node_id| {
            let mut options = c.scanned.options.clone();
            let name = options.0.remove("_name").unwrap_or_default();
            Ok(Command::NewPeer { peer_node_id, name, options })
        })
    }),
    verb("del-peer", R_N, FORCE, |c| {
        peer(c, |c, peer_node_id| Ok(Command::DelPeer { peer_node_id, force: c.scanned.is_set("force") }))
    }),
    verb("new-path", PATH, NONE, |c| {
        peer(c, |c, peer_node_id| {
            Ok(Command::NewPath { peer_node_id, local: endpoint(c, 2)?, remote: endpoint(c, 3)? })
        })
    }),
    verb("del-path", PATH, NONE, |c| {
        peer(c, |c, peer_node_id| {
            Ok(Command::DelPath { peer_node_id, local: endpoint(c, 2)?, remote: endpoint(c, 3)? })
        })
    }),
    verb("net-options", R_N, accepts(SET_DEFAULTS, &[Class::Net]), |c| {
        peer(c, |c, peer_node_id| {
            let mut options = c.scanned.options.clone();
            // The name is given for the kernel's sake; it cannot change while the connection exists.
            options.0.remove("_name");
            let set_defaults = c.scanned.is_set("set-defaults");
            Ok(Command::NetOptions { peer_node_id, options, set_defaults })
        })
    }),
    verb("disconnect", R_N, FORCE, |c| {
        peer(c, |c, peer_node_id| Ok(Command::Disconnect { peer_node_id, force: c.scanned.is_set("force") }))
    }),
    verb(
        "resize",
        M,
        accepts(
            &[
                ("size", Takes::Value),
                ("assume-peer-has-space", Takes::Switch),
                ("assume-clean", Takes::Switch),
                ("al-stripes", Takes::Value),
                ("al-stripe-size-kB", Takes::Value),
            ],
            &[],
        ),
        |c| minor(c, resize),
    ),
    verb("new-resource", &["resource", "node_id"], accepts(&[], &[Class::Resource]), new_resource),
    verb("resource-options", R, accepts(SET_DEFAULTS, &[Class::Resource]), |c| {
        resource(c, |c| {
            Ok(Command::ResourceOptions {
                options: c.scanned.options.clone(),
                set_defaults: c.scanned.is_set("set-defaults"),
            })
        })
    }),
    verb("new-minor", &["resource", "minor", "volume"], accepts(&[], &[Class::Device]), |c| {
        let minor = c.minor(1)?;
        if let Some((owner, _)) = engines::owner_of_minor(minor)?
            && owner != c.word(0)
        {
            let refusal = Refusal::new(code::MINOR_OR_VOLUME_EXISTS)
                .with_info(format!("minor {minor} belongs to resource '{owner}'"));
            return Err(Failure::new(refusal.exit_code(), refusal.render(c.word(0))));
        }
        resource(c, |c| {
            let volume = c.number(2, "volume number")?;
            Ok(Command::NewMinor { minor: c.minor(1)?, volume, options: c.scanned.options.clone() })
        })
    }),
    verb("del-minor", M, NONE, |c| minor(c, |_, minor| Ok(Command::DelMinor { minor }))),
    verb("del-resource", R, NONE, |c| resource(c, |_| Ok(Command::DelResource))),
    verb("peer-device-options", R_N_V, accepts(SET_DEFAULTS, &[Class::PeerDevice]), |c| {
        peer(c, |c, peer_node_id| {
            Ok(Command::PeerDeviceOptions {
                peer_node_id,
                volume: c.number(2, "volume number")?,
                options: c.scanned.options.clone(),
                set_defaults: c.scanned.is_set("set-defaults"),
            })
        })
    }),
    verb(
        "new-current-uuid",
        M,
        accepts(&[("clear-bitmap", Takes::Switch), ("force-resync", Takes::Switch)], &[]),
        |c| {
            minor(c, |c, minor| {
                Ok(Command::NewCurrentUuid {
                    minor,
                    clear_bitmap: c.scanned.is_set("clear-bitmap"),
                    force_resync: c.scanned.is_set("force-resync"),
                })
            })
        },
    ),
    verb(
        "invalidate",
        M,
        accepts(&[("sync-from-peer-node-id", Takes::Value), ("reset-bitmap", Takes::Switch)], &[]),
        |c| {
            minor(c, |c, minor| {
                let sync_from = match c.scanned.flag("sync-from-peer-node-id") {
                    None | Some("-1") => None,
                    Some(text) => Some(node_id(text)?),
                };
                Ok(Command::Invalidate { minor, reset_bitmap: reset_bitmap(c), sync_from })
            })
        },
    ),
    verb("invalidate-remote", R_N_V, accepts(&[("reset-bitmap", Takes::Switch)], &[]), |c| {
        peer(c, |c, peer_node_id| {
            Ok(Command::InvalidateRemote {
                peer_node_id,
                volume: c.number(2, "volume number")?,
                reset_bitmap: reset_bitmap(c),
            })
        })
    }),
    verb("pause-sync", R_N_V, NONE, |c| {
        peer(c, |c, peer_node_id| {
            Ok(Command::PauseSync { peer_node_id, volume: c.number(2, "volume number")? })
        })
    }),
    verb("resume-sync", R_N_V, NONE, |c| {
        peer(c, |c, peer_node_id| {
            Ok(Command::ResumeSync { peer_node_id, volume: c.number(2, "volume number")? })
        })
    }),
    verb("suspend-io", M, NONE, |c| minor(c, |_, minor| Ok(Command::SuspendIo { minor }))),
    verb("resume-io", M, NONE, |c| minor(c, |_, minor| Ok(Command::ResumeIo { minor }))),
    verb("outdate", M, NONE, |c| minor(c, |_, minor| Ok(Command::Outdate { minor }))),
    verb("verify", R_N_V, accepts(&[("start", Takes::Value), ("stop", Takes::Value)], &[]), |c| {
        peer(c, |c, peer_node_id| {
            Ok(Command::Verify {
                peer_node_id,
                volume: c.number(2, "volume number")?,
                start_sector: sectors(c, "start")?,
                stop_sector: sectors(c, "stop")?,
            })
        })
    }),
    verb("down", R, NONE, down),
    verb("forget-peer", R_N, NONE, |c| peer(c, |_, peer_node_id| Ok(Command::ForgetPeer { peer_node_id }))),
    verb("role", R, NONE, query::role),
    verb("peer-role", R_N, NONE, query::peer_role),
    verb("cstate", R_N, NONE, query::cstate),
    verb("dstate", M, NONE, query::dstate),
    verb("show-gi", R_N_V, NONE, query::show_gi),
    verb("get-gi", R_N_V, NONE, query::get_gi),
    verb(
        "show",
        &["[resource]"],
        accepts(&[("show-defaults", Takes::Switch), ("json", Takes::Switch)], &[]),
        query::show,
    ),
    verb(
        "status",
        &["[resource]"],
        accepts(
            &[
                ("verbose", Takes::Switch),
                ("statistics", Takes::Switch),
                ("json", Takes::Switch),
                ("color", Takes::Optional),
            ],
            &[],
        ),
        query::status,
    ),
    verb("check-resize", M, NONE, query::check_resize),
    verb(
        "events2",
        &["[resource]"],
        accepts(
            &[
                ("now", Takes::Switch),
                ("timestamps", Takes::Switch),
                ("statistics", Takes::Switch),
                ("full", Takes::Switch),
                ("rcvbuf", Takes::Value),
                ("color", Takes::Optional),
                ("poll", Takes::Switch),
                ("diff", Takes::Optional),
            ],
            &[],
        ),
        events::events2,
    ),
    verb("wait-connect-resource", R, accepts(&[], WAIT), wait::connect),
    verb("wait-connect-connection", R_N, accepts(&[], WAIT), wait::connect),
    verb("wait-connect-volume", R_N_V, accepts(&[], WAIT), wait::connect),
    verb("wait-sync-resource", R, accepts(&[], WAIT), wait::sync),
    verb("wait-sync-connection", R_N, accepts(&[], WAIT), wait::sync),
    verb("wait-sync-volume", R_N_V, accepts(&[], WAIT), wait::sync),
];

/// A command about the resource named first.
fn resource(c: &Call<'_>, make: fn(&Call<'_>) -> Result<Command, Failure>) -> Result<i32, Failure> {
    let name = c.word(0);
    if let Server::Kernel(kernel) = engines::server_of(name)? {
        return hand_over(&kernel, c.args);
    }
    order(name, name, &make(c)?)
}

/// A command about the connection named first.
fn peer(c: &Call<'_>, make: fn(&Call<'_>, u8) -> Result<Command, Failure>) -> Result<i32, Failure> {
    let name = c.word(0);
    if let Server::Kernel(kernel) = engines::server_of(name)? {
        return hand_over(&kernel, c.args);
    }
    let peer_node_id = node_id(c.word(1))?;
    order(name, name, &make(c, peer_node_id)?)
}

/// A command about the minor named first.
fn minor(c: &Call<'_>, make: fn(&Call<'_>, u32) -> Result<Command, Failure>) -> Result<i32, Failure> {
    let minor = c.minor(0)?;
    if let Server::Kernel(kernel) = engines::server_of_minor(minor)? {
        return hand_over(&kernel, c.args);
    }
    let command = make(c, minor)?;
    let (name, _) = resource_of_minor(minor)?;
    order(&name, &minor.to_string(), &command)
}

fn new_resource(c: &Call<'_>) -> Result<i32, Failure> {
    let name = c.word(0).to_owned();
    if let Server::Kernel(kernel) = engines::server_of(&name)? {
        return hand_over(&kernel, c.args);
    }
    if name.is_empty() || name.contains('/') || name.starts_with('.') || name.chars().any(char::is_control) {
        return Err(Failure::new(EXIT_USAGE, format!("'{name}' cannot be the name of a resource")));
    }
    let node_id = node_id(c.word(1))?;
    engines::start(&name)?;
    order(
        &name,
        &name,
        &Command::NewResource { name: name.clone(), node_id, options: c.scanned.options.clone() },
    )
}

/// An unknown resource is down already.
fn down(c: &Call<'_>) -> Result<i32, Failure> {
    let name = c.word(0);
    if name == "all" {
        let mut worst = 0;
        for r in palisade_control::running_resources()
            .map_err(|e| Failure::new(EXIT_USAGE, format!("Cannot list the engines: {e}.")))?
        {
            let result = take_down(&r, c).unwrap_or_else(|f| f.report());
            worst = worst.max(result);
        }
        return Ok(worst);
    }
    take_down(name, c)
}

fn take_down(name: &str, c: &Call<'_>) -> Result<i32, Failure> {
    if let Server::Kernel(kernel) = engines::server_of(name)? {
        return hand_over(&kernel, c.args);
    }
    match engines::connect(name) {
        Err(palisade_control::ClientError::NotRunning { .. }) => Ok(0),
        _ => order(name, name, &Command::Down),
    }
}

fn resize(c: &Call<'_>, minor: u32) -> Result<Command, Failure> {
    let number =
        |name: &str, min: u32, max: u32| -> Result<Option<u32>, Failure> {
            let Some(text) = c.scanned.flag(name) else { return Ok(None) };
            text.parse::<u32>().ok().filter(|n| (min..=max).contains(n)).map(Some).ok_or_else(|| {
                Failure::new(EXIT_USAGE, format!("Option --{name}: invalid argument '{text}'"))
            })
        };
    Ok(Command::Resize {
        minor,
        size_sectors: sectors(c, "size")?.filter(|s| *s > 0),
        assume_peer_has_space: c.scanned.is_set("assume-peer-has-space"),
        assume_clean: c.scanned.is_set("assume-clean"),
        al_stripes: number("al-stripes", 1, 1024)?,
        al_stripe_size_kib: number("al-stripe-size-kB", 4, 16_777_216)?,
    })
}

/// The reference's default is to reset the bitmap.
fn reset_bitmap(c: &Call<'_>) -> bool {
    c.scanned.flag("reset-bitmap") != Some("no")
}

/// A size option in sectors; suffixes as in the configuration.
fn sectors(c: &Call<'_>, name: &str) -> Result<Option<u64>, Failure> {
    let Some(text) = c.scanned.flag(name) else { return Ok(None) };
    let size = options::find_in(Class::Attach, "size").and_then(|spec| spec.validate(text).ok());
    match size {
        Some(Canonical::Number(n)) => Ok(Some(n)),
        _ => Err(Failure::new(EXIT_USAGE, format!("Option --{name}: invalid argument '{text}'"))),
    }
}

pub fn node_id(text: &str) -> Result<u8, Failure> {
    const NODE_ID_MAX: u8 = 31;
    text.parse::<u8>().ok().filter(|n| *n <= NODE_ID_MAX).ok_or_else(|| {
        Failure::new(EXIT_USAGE, format!("'{text}' is not a node id; expected 0 to {NODE_ID_MAX}"))
    })
}

/// The engine works in another directory.
fn absolute(path: &str) -> String {
    std::path::absolute(path)
        .ok()
        .and_then(|p| p.to_str().map(str::to_owned))
        .unwrap_or_else(|| path.to_owned())
}

fn endpoint(c: &Call<'_>, index: usize) -> Result<Endpoint, Failure> {
    c.word(index).parse().map_err(|e| Failure::new(EXIT_USAGE, format!("{e}")))
}
