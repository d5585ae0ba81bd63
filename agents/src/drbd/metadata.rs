//! The `meta-data` action: an XML description that is valid against the OCF document type, the schema
//! of resource-agents and those of pcs (`spec/ocf-agents.md` §1.7).

use std::fmt::Write;

use palisade_cluster::Environment;

use super::parameters::DEFINITIONS;

const LONG: &str = "\
Manages a DRBD resource, served by the Palisade engine or by the kernel's DRBD, as a promotable clone. \
The agent starts and stops the resource, promotes and demotes it, and keeps the promotion score of its node: \
the better the data that the node has access to, the higher the score; a node without usable data, or without \
quorum, has none and is not promoted. The clone needs notify=true.";

const SHORT: &str = "Manages a DRBD resource as a promotable clone";

struct Operation {
    name: &'static str,
    timeout_s: u32,
    /// Interval in seconds and whether it is the promoted role's.
    recurring: Option<(u32, bool)>,
}

const fn once(name: &'static str, timeout_s: u32) -> Operation {
    Operation { name, timeout_s, recurring: None }
}

/// `reload-agent` is implemented too, but no document of API 1.0 may name it.
const OPERATIONS: [Operation; 10] = [
    once("start", 240),
    once("reload", 30),
    once("promote", 90),
    once("demote", 90),
    once("notify", 90),
    once("stop", 100),
    Operation { name: "monitor", timeout_s: 20, recurring: Some((20, false)) },
    Operation { name: "monitor", timeout_s: 20, recurring: Some((10, true)) },
    once("meta-data", 5),
    once("validate-all", 30),
];

/// Renders the document. Roles have the names of Pacemaker 2.1 and later unless the caller says that it
/// speaks the older version 1.0 of the interface.
pub fn render(env: &Environment) -> String {
    let roles = match env.get("OCF_RA_VERSION_MINOR") {
        Some("0") => ["Slave", "Master"],
        _ => ["Unpromoted", "Promoted"],
    };
    let mut xml = String::from(
        "<?xml version=\"1.0\"?>\n<!DOCTYPE resource-agent SYSTEM \"ra-api-1.dtd\">\n\
         <resource-agent name=\"drbd\" version=\"",
    );
    xml.push_str(env!("CARGO_PKG_VERSION"));
    xml.push_str("\">\n<version>1.0</version>\n");
    element(&mut xml, "", "longdesc", LONG);
    element(&mut xml, "", "shortdesc", SHORT);
    xml.push_str("<parameters>\n");
    for definition in DEFINITIONS {
        // Writing to a string cannot fail, here and below.
        let _ = writeln!(
            xml,
            "  <parameter name=\"{}\" unique=\"{}\" required=\"{}\">",
            definition.name,
            u8::from(definition.unique),
            u8::from(definition.default.is_none()),
        );
        element(&mut xml, "    ", "longdesc", definition.long);
        element(&mut xml, "    ", "shortdesc", definition.short);
        let _ = write!(xml, "    <content type=\"{}\"", definition.kind.word());
        if let Some(default) = definition.default {
            let _ = write!(xml, " default=\"{}\"", escaped(default));
        }
        xml.push_str("/>\n  </parameter>\n");
    }
    xml.push_str("</parameters>\n<actions>\n");
    for operation in &OPERATIONS {
        let _ = write!(xml, "  <action name=\"{}\" timeout=\"{}s\"", operation.name, operation.timeout_s);
        if let Some((interval, promoted)) = operation.recurring {
            let [unpromoted_name, promoted_name] = roles;
            let role = if promoted { promoted_name } else { unpromoted_name };
            let _ = write!(xml, " interval=\"{interval}s\" role=\"{role}\"");
        }
        xml.push_str("/>\n");
    }
    xml.push_str("</actions>\n</resource-agent>\n");
    xml
}

fn element(xml: &mut String, indent: &str, name: &str, text: &str) {
    let _ = writeln!(xml, "{indent}<{name} lang=\"en\">{}</{name}>", escaped(text));
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_and_operation_is_described_once() {
        let xml = render(&Environment::default());
        for definition in DEFINITIONS {
            let opening = format!("<parameter name=\"{}\"", definition.name);
            assert_eq!(xml.matches(&opening).count(), 1, "{}", definition.name);
        }
        assert_eq!(xml.matches("<shortdesc").count(), DEFINITIONS.len() + 1);
        assert_eq!(xml.matches(" timeout=\"").count(), OPERATIONS.len());
        assert_eq!(xml.matches("required=\"1\"").count(), 1);
        assert!(xml.contains("role=\"Promoted\"") && xml.contains("role=\"Unpromoted\""));
    }

    #[test]
    fn old_callers_get_the_old_roles() {
        let old = render(&Environment::from_vars([("OCF_RA_VERSION_MINOR", "0")]));
        assert!(old.contains("role=\"Master\"") && old.contains("role=\"Slave\""));
        assert!(!old.contains("romoted\""));
    }

    #[test]
    fn monitor_intervals_differ_between_roles() {
        let mut intervals: Vec<u32> =
            OPERATIONS.iter().filter_map(|op| op.recurring).map(|(interval, _)| interval).collect();
        let all = intervals.len();
        intervals.sort_unstable();
        intervals.dedup();
        assert_eq!((all, intervals.len()), (2, 2));
    }

    #[test]
    fn text_is_escaped() {
        assert_eq!(escaped("a<b & \"c\">"), "a&lt;b &amp; &quot;c&quot;&gt;");
    }
}
