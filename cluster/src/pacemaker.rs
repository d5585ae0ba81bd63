//! What an agent asks of Pacemaker: its promotion score, and where instances are promoted.
//!
//! Every call is one bounded child process with an argument list, never a shell. Scores go straight to
//! the attribute daemon, so they last until the node leaves (lifetime `reboot`) and cost no update of
//! the cluster's configuration unless they change.

use std::path::Path;
use std::time::Duration;

use quick_xml::Reader;
use quick_xml::events::Event;

use crate::child::{self, ChildError, Output};
use crate::ocf::Environment;

const SCORE_TOOL: &str = "attrd_updater";
const LOCATE_TOOL: &str = "crm_resource";

/// Most nodes read from one answer.
const NODES_MAX: usize = 4096;

/// Why the cluster gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum PacemakerError {
    /// The tool could not be run or took too long.
    #[error(transparent)]
    Child(#[from] ChildError),
    /// The tool ran and refused.
    #[error("{tool} failed with exit code {code}: {message}. Check that Pacemaker runs on this node.")]
    Refused {
        /// The tool.
        tool: &'static str,
        /// Its exit code.
        code: i32,
        /// Its standard error on one line.
        message: String,
    },
    /// The tool's answer is not the XML that is documented.
    #[error("The XML answer of {tool} was not understood: {detail}. Pacemaker 2.0.3 or newer gives it.")]
    Unreadable {
        /// The tool.
        tool: &'static str,
        /// What is wrong with the answer.
        detail: String,
    },
}

/// The cluster as one resource instance sees it.
#[derive(Debug, Clone)]
pub struct Pacemaker {
    instance: String,
    node: Option<String>,
}

impl Pacemaker {
    /// The view of the instance that Pacemaker's environment names.
    #[must_use]
    pub fn new(environment: &Environment) -> Self {
        Self { instance: environment.instance().to_owned(), node: environment.node().map(str::to_owned) }
    }

    /// Sets this node's promotion score.
    pub fn set_promotion_score(&self, score: u32, limit: Duration) -> Result<(), PacemakerError> {
        self.attribute(&["--update", &score.to_string()], limit)
    }

    /// Takes this node's promotion score away: it will not be promoted. Without a score this succeeds too.
    pub fn remove_promotion_score(&self, limit: Duration) -> Result<(), PacemakerError> {
        self.attribute(&["--delete"], limit)
    }

    /// Names of the nodes where the cluster knows a promoted instance of this resource.
    pub fn promoted_nodes(&self, limit: Duration) -> Result<Vec<String>, PacemakerError> {
        let args = ["--resource", &self.instance, "--locate", "--output-as=xml"];
        let output = call(LOCATE_TOOL, &args, limit)?;
        promoted_in(&output.stdout).map_err(|detail| PacemakerError::Unreadable { tool: LOCATE_TOOL, detail })
    }

    /// Name of the node attribute that holds the promotion score; the same in all versions
    /// (`spec/ocf-agents.md` §1.6).
    fn attribute_name(&self) -> String {
        format!("master-{}", self.instance)
    }

    fn attribute(&self, what: &[&str], limit: Duration) -> Result<(), PacemakerError> {
        let name = self.attribute_name();
        let mut args = vec!["--name", &name];
        args.extend_from_slice(what);
        // Without a name the tool asks the cluster for that of the local node.
        if let Some(node) = &self.node {
            args.extend_from_slice(&["--node", node]);
        }
        call(SCORE_TOOL, &args, limit).map(drop)
    }
}

fn call(tool: &'static str, args: &[&str], limit: Duration) -> Result<Output, PacemakerError> {
    let program =
        child::find_program(tool).ok_or_else(|| ChildError::NotFound { program: tool.to_owned() })?;
    call_program(tool, &program, args, limit)
}

fn call_program(
    tool: &'static str,
    program: &Path,
    args: &[&str],
    limit: Duration,
) -> Result<Output, PacemakerError> {
    let output = child::run(program, args, &[], limit)?;
    if output.success() {
        return Ok(output);
    }
    let message = output.stderr.split_whitespace().collect::<Vec<_>>().join(" ");
    Err(PacemakerError::Refused { tool, code: output.code, message })
}

/// Reads `<nodes><node state="promoted">NAME</node>…</nodes>`. The document must be complete, so that a
/// cut answer is never taken for "promoted nowhere".
fn promoted_in(xml: &str) -> Result<Vec<String>, String> {
    let mut reader = Reader::from_str(xml);
    let mut promoted = Vec::new();
    let mut in_promoted = false;
    let mut name = String::new();
    let mut complete = false;
    loop {
        match reader.read_event().map_err(|error| error.to_string())? {
            Event::Start(element) if element.name().as_ref() == b"node" => {
                let state = element
                    .try_get_attribute("state")
                    .map_err(|error| error.to_string())?
                    .map(|attribute| attribute.value.to_ascii_lowercase());
                in_promoted = state.as_deref().is_some_and(|s| s == b"promoted" || s == b"master");
                name.clear();
            }
            Event::Text(text) if in_promoted => {
                name.push_str(&text.decode().map_err(|error| error.to_string())?);
            }
            Event::End(element) if element.name().as_ref() == b"node" && in_promoted => {
                in_promoted = false;
                if promoted.len() < NODES_MAX {
                    promoted.push(name.trim().to_owned());
                }
            }
            Event::End(element) if element.name().as_ref() == b"pacemaker-result" => complete = true,
            Event::Eof if complete => return Ok(promoted),
            Event::Eof => return Err("the answer ends too early".to_owned()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const LOCATED: &str = r#"<pacemaker-result api-version="2.25" request="crm_resource --locate">
  <nodes resource="p_r0">
    <node state="promoted">alice</node>
    <node>bob</node>
  </nodes>
  <status code="0" message="OK"/>
</pacemaker-result>
"#;

    #[test]
    fn promoted_nodes_are_read_from_xml() {
        assert_eq!(promoted_in(LOCATED).unwrap(), ["alice"]);
        let nobody = LOCATED.replace(r#" state="promoted""#, "");
        assert!(promoted_in(&nobody).unwrap().is_empty());
        let old = LOCATED.replace("promoted\"", "Master\"");
        assert_eq!(promoted_in(&old).unwrap(), ["alice"]);
    }

    #[test]
    fn a_cut_or_foreign_answer_is_no_answer() {
        for cut in [0, 10, 100, 150, LOCATED.len() - 5] {
            assert!(promoted_in(&LOCATED[..cut]).is_err(), "{cut}");
        }
        assert!(promoted_in("resource p_r0 is running on: alice Promoted\n").is_err());
        assert!(promoted_in("<a></b>").is_err());
    }

    #[test]
    fn refusals_and_hangs_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let tool = dir.path().join("tool");
        let script = |body: &str| {
            std::fs::write(&tool, format!("#!/bin/sh\n{body}\n")).unwrap();
            std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).unwrap();
            call_program("tool", &tool, &["--name", "x; exit 0"], Duration::from_millis(300))
        };
        assert_eq!(script("echo \"$2\"").unwrap().stdout, "x; exit 0\n");
        let error = script("echo 'Could not connect:\nTransport' >&2; exit 102").unwrap_err();
        assert!(error.to_string().contains("exit code 102: Could not connect: Transport"), "{error}");
        assert!(matches!(script("sleep 9"), Err(PacemakerError::Child(ChildError::TimedOut { .. }))));
    }

    #[test]
    fn attribute_has_the_historic_name() {
        let environment = Environment::from_vars([("OCF_RESOURCE_INSTANCE", "p_r0")]);
        assert_eq!(Pacemaker::new(&environment).attribute_name(), "master-p_r0");
    }
}
