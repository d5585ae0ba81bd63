//! What the tests of this crate share: the lab's nodes, an installed build, commands with limits.
//!
//! The tests themselves are in `tests/cluster/`; they need root, Debian 12 with the packages of
//! `make setup`, and take minutes. They run one at a time, also across processes.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A step of a test failed before the product was even asked.
#[derive(thiserror::Error)]
pub enum Error {
    /// A command could not be started.
    #[error("'{command}' could not be started: {source}; `make setup` installs what tests need")]
    Start {
        /// The command line, joined by blanks.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// A command ended with another status than 0.
    #[error("'{command}' ended with {status}:\n{output}")]
    Status {
        /// The command line, joined by blanks.
        command: String,
        /// Its status, in words.
        status: String,
        /// Both output streams.
        output: String,
    },
    /// These tests make namespaces, mounts and loop devices.
    #[error(
        "cluster tests need root: run them as root, with `make test` or `cargo test -p palisade-ocf-tests`"
    )]
    NotRoot,
    /// A file of the test could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// As its text: this is what a failed test prints.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The root of the source tree.
#[must_use]
pub fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// What a command wrote.
#[derive(Debug, Clone)]
pub struct Ran {
    /// Whether it ended with status 0.
    pub success: bool,
    /// Exit status; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            success: output.status.success(),
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Run a command to its end, whatever its status; `text` is its standard input.
///
/// # Errors
/// [`Error::Start`] when it cannot be started or its input cannot be given.
pub fn run<S: AsRef<OsStr>>(arguments: &[S], text: &str) -> Result<Ran, Error> {
    let line = arguments.iter().map(|a| a.as_ref().to_string_lossy()).collect::<Vec<_>>().join(" ");
    let failed = |source| Error::Start { command: line.clone(), source };
    let (program, rest) =
        arguments.split_first().ok_or_else(|| failed(io::Error::other("no command given")))?;
    let mut child = Command::new(program)
        .args(rest)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut input) = child.stdin.take() {
        // A command that does not read its input is no error.
        let _ = io::Write::write_all(&mut input, text.as_bytes());
    }
    Ok(child.wait_with_output().map_err(failed)?.into())
}

/// Run a command that has to succeed; returns its standard output.
///
/// # Errors
/// [`Error::Start`], or [`Error::Status`] when it ends with another status than 0.
pub fn must<S: AsRef<OsStr>>(arguments: &[S]) -> Result<String, Error> {
    let ran = run(arguments, "")?;
    if ran.success {
        return Ok(ran.out);
    }
    Err(Error::Status {
        command: arguments.iter().map(|a| a.as_ref().to_string_lossy()).collect::<Vec<_>>().join(" "),
        status: ran.code.map_or_else(|| "a signal".to_owned(), |code| format!("status {code}")),
        output: format!("{}{}", ran.out, ran.err),
    })
}

/// The right to use the machine: held by one test at a time, also across processes.
#[derive(Debug)]
pub struct Turn {
    _lock: File,
}

impl Turn {
    /// Wait for the turn of the calling test.
    ///
    /// # Errors
    /// [`Error::NotRoot`], or [`Error::File`] when the lock file cannot be made.
    pub fn take() -> Result<Self, Error> {
        if must(&["id", "-u"])?.trim() != "0" {
            return Err(Error::NotRoot);
        }
        let path = PathBuf::from("/run/palisade-ocf-tests.lock");
        let lock = File::create(&path).map_err(|source| Error::File { path: path.clone(), source })?;
        lock.lock().map_err(|source| Error::File { path, source })?;
        Ok(Self { _lock: lock })
    }
}

/// What `make install` puts below a directory, built once per process.
///
/// # Errors
/// [`Error::Status`] with the compiler's messages when the build fails.
pub fn staged() -> Result<PathBuf, Error> {
    static BUILD: std::sync::Mutex<Option<PathBuf>> = std::sync::Mutex::new(None);
    let mut built = BUILD.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(directory) = built.as_ref() {
        return Ok(directory.clone());
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| top().join("target"), PathBuf::from);
    let directory = target.join("stage");
    if directory.exists() {
        fs::remove_dir_all(&directory).map_err(|source| Error::File { path: directory.clone(), source })?;
    }
    must(&[
        "make".into(),
        "-C".into(),
        top().into_os_string(),
        "install".into(),
        format!("DESTDIR={}", directory.display()).into(),
        "PREFIX=/usr".into(),
        format!("CARGO_TARGET_DIR={}", target.display()).into(),
    ])?;
    *built = Some(directory.clone());
    Ok(directory)
}

/// Some lab nodes with the build installed; they end with this value.
#[derive(Debug)]
pub struct Lab {
    name: String,
}

impl Lab {
    /// Start nodes (alice, bob, charlie…) with the build of `stage`; `options` go to `lab up`.
    ///
    /// # Errors
    /// Whatever `lab up` complains about.
    pub fn up(nodes: u32, stage: &Path, options: &[&str]) -> Result<Self, Error> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let lab =
            Self { name: format!("test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)) };
        let mut arguments = vec!["-n".to_owned(), nodes.to_string()];
        for path in ["sbin/palisade", "sbin/palisaded", "lib/palisade", "lib/ocf/resource.d/palisade"] {
            let source = stage.join("usr").join(path);
            arguments.extend(["--bind".to_owned(), format!("{}:/usr/{path}:ro", source.display())]);
        }
        arguments.extend(options.iter().map(|&option| option.to_owned()));
        lab.command("up", &arguments)?;
        Ok(lab)
    }

    fn command(&self, verb: &str, rest: &[String]) -> Result<String, Error> {
        let program = top().join("ocf-tests/lab/lab").display().to_string();
        let mut arguments = vec![program, verb.to_owned(), "--name".to_owned(), self.name.clone()];
        arguments.extend_from_slice(rest);
        must(&arguments)
    }

    /// Run a command in a node to its end, whatever its status.
    ///
    /// # Errors
    /// [`Error::Start`] when the lab's own command cannot be started.
    pub fn on(&self, node: &str, command: &[&str], text: &str) -> Result<Ran, Error> {
        let program = top().join("ocf-tests/lab/lab").display().to_string();
        let mut arguments = vec![program.as_str(), "exec", "--name", &self.name, node, "--"];
        arguments.extend_from_slice(command);
        run(&arguments, text)
    }

    /// Run a command in a node that has to succeed; returns its standard output.
    ///
    /// # Errors
    /// [`Error::Status`] with what the command wrote.
    pub fn must_on(&self, node: &str, command: &[&str]) -> Result<String, Error> {
        let mut rest = vec![node.to_owned(), "--".to_owned()];
        rest.extend(command.iter().map(|&word| word.to_owned()));
        self.command("exec", &rest)
    }

    /// Write a file in a node.
    ///
    /// # Errors
    /// [`Error::Status`] when the node refuses it.
    pub fn write(&self, node: &str, path: &str, text: &str) -> Result<(), Error> {
        let ran = self.on(node, &["tee", path], text)?;
        if ran.success {
            return Ok(());
        }
        Err(Error::Status { command: format!("tee {path}"), status: "an error".to_owned(), output: ran.err })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.command("down", &[]) {
            eprintln!("the lab {} was not removed: {error}", self.name);
        }
    }
}
