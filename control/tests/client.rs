//! The client against engines that behave and engines that do not.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use palisade_control::{
    Client, ClientError, ClientMessage, Command, Event, EventBatch, FrameDecoder, PROTOCOL_VERSION, Payload,
    Reply, ServerMessage, code, encode,
};

const LIMIT: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(50);

/// A socket with a thread behind it that runs `serve` on the first connection.
fn engine(serve: impl FnOnce(Talk) + Send + 'static) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r0.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        serve(Talk { stream, decoder: FrameDecoder::new() });
    });
    (dir, path)
}

struct Talk {
    stream: UnixStream,
    decoder: FrameDecoder,
}

impl Talk {
    fn hear(&mut self) -> Option<ClientMessage> {
        loop {
            if let Some(message) = self.decoder.next_message().unwrap() {
                return Some(message);
            }
            let mut chunk = [0; 512];
            match self.stream.read(&mut chunk) {
                Ok(0) | Err(_) => return None,
                Ok(n) => self.decoder.push(&chunk[..n]),
            }
        }
    }

    fn say(&mut self, message: &ServerMessage) {
        let _ = self.stream.write_all(&encode(message).unwrap());
    }

    fn greet(&mut self) {
        assert!(matches!(self.hear(), Some(ClientMessage::Hello { protocol: PROTOCOL_VERSION, .. })));
        self.say(&ServerMessage::Hello {
            protocol: PROTOCOL_VERSION,
            resource: "r0".into(),
            version: "1".into(),
        });
    }

    fn answer(&mut self, reply: Reply) {
        let Some(ClientMessage::Request { id, .. }) = self.hear() else { return };
        self.say(&ServerMessage::Reply { id, reply });
    }
}

#[test]
fn questions_and_refusals() {
    let (_dir, path) = engine(|mut t| {
        t.greet();
        t.answer(Reply::with(Payload::Status(None)));
        t.answer(Reply::refused(code::NO_UP_TO_DATE_DISK));
    });
    let mut client = Client::connect_path("r0", &path, LIMIT).unwrap();
    assert_eq!(client.engine_version(), "1");
    assert_eq!(client.status(LIMIT).unwrap(), None);
    let Reply::Refused(refusal) = client.call(Command::Primary { force: false }, LIMIT).unwrap() else {
        panic!("granted")
    };
    assert_eq!(refusal.exit_code(), 17);
    assert_eq!(refusal.render("r0"), "r0: State change failed: (-2) Need access to UpToDate data\n");
}

#[test]
fn a_silent_engine_costs_no_more_than_the_limit() {
    let (_dir, path) = engine(|mut t| {
        t.greet();
        t.hear();
        // One byte from time to time must not extend the limit.
        while t.stream.write_all(&[0]).is_ok() {
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    let mut client = Client::connect_path("r0", &path, LIMIT).unwrap();
    let start = Instant::now();
    let error = client.call(Command::Status, Duration::from_millis(30)).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(2));
    assert!(matches!(error, ClientError::Timeout { .. } | ClientError::Frame { .. }), "{error}");
}

#[test]
fn nobody_there() {
    let dir = tempfile::tempdir().unwrap();
    let error = Client::connect_path("r0", &dir.path().join("r0.sock"), SHORT).unwrap_err();
    assert!(matches!(error, ClientError::NotRunning { .. }), "{error}");
    drop(UnixListener::bind(dir.path().join("dead.sock")).unwrap());
    let error = Client::connect_path("r0", &dir.path().join("dead.sock"), SHORT).unwrap_err();
    assert!(matches!(error, ClientError::NotRunning { .. }), "{error}");
    for name in ["", "a/b", "../x", ".hidden"] {
        assert!(matches!(Client::connect(name, SHORT), Err(ClientError::BadName { .. })), "{name}");
    }
}

#[test]
fn other_versions_and_other_resources_are_told_apart() {
    let (_dir, path) = engine(|mut t| {
        t.hear();
        t.say(&ServerMessage::Incompatible { protocol: 99, version: "9.9".into() });
    });
    let error = Client::connect_path("r0", &path, LIMIT).unwrap_err();
    assert!(error.to_string().contains("speaks control protocol 99"), "{error}");
    let (_dir, path) = engine(|mut t| t.greet());
    let error = Client::connect_path("r1", &path, LIMIT).unwrap_err();
    assert!(error.to_string().contains("serves resource 'r0'"), "{error}");
}

#[test]
fn an_engine_that_dies_or_lies() {
    let (_dir, path) = engine(|mut t| t.greet());
    let mut client = Client::connect_path("r0", &path, LIMIT).unwrap();
    let error = client.call(Command::Status, LIMIT).unwrap_err();
    assert!(matches!(error, ClientError::Closed { .. }), "{error}");

    let (_dir, path) = engine(|mut t| {
        t.greet();
        t.hear();
        t.say(&ServerMessage::Reply { id: 4711, reply: Reply::done() });
        t.hear();
    });
    let mut client = Client::connect_path("r0", &path, LIMIT).unwrap();
    let error = client.call(Command::Status, LIMIT).unwrap_err();
    assert!(matches!(error, ClientError::Protocol { .. }), "{error}");

    let (_dir, path) = engine(|mut t| {
        t.greet();
        t.hear();
        let _ = t.stream.write_all(&[0xff; 64]);
        t.hear();
    });
    let mut client = Client::connect_path("r0", &path, LIMIT).unwrap();
    let error = client.call(Command::Status, LIMIT).unwrap_err();
    assert!(matches!(error, ClientError::Frame { .. }), "{error}");
}

#[test]
fn events_arrive_in_order_and_the_end_is_seen() {
    let (_dir, path) = engine(|mut t| {
        t.greet();
        t.answer(Reply::done());
        for time_us in 1..=3 {
            t.say(&ServerMessage::Events(EventBatch { time_us, events: vec![Event::ExistsEnd] }));
        }
    });
    let mut events = Client::connect_path("r0", &path, LIMIT).unwrap().subscribe(LIMIT).unwrap();
    assert_eq!(events.next_batch(Some(LIMIT)).unwrap().time_us, 1);
    let mut times = Vec::new();
    loop {
        let (batches, open) = events.arrived().unwrap();
        times.extend(batches.iter().map(|b| b.time_us));
        if !open {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(times, [2, 3]);
}
