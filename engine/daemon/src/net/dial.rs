//! The connect loop of one peer (`spec/wire-protocol.md` §2.3), without the ring: it is told what happened
//! and says what to do.
//!
//! It departs from the kernel's loop in two harmless ways: after a failed attempt it waits for an incoming
//! connection only 0.1 s at first, twice as long each time up to connect-int; and an outgoing attempt that
//! hangs is given up when the peer calls.

use crate::core_api::{Stream, Time};
use crate::ring::Fd;
use crate::sys;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

/// Sockets that the peer opened and that wait for their turn.
const BACKLOG_MAX: usize = 4;
/// First wait for an incoming connection after a failed attempt.
const WAIT_FIRST: Duration = Duration::from_millis(100);
/// An attempt older than this is given up when the peer calls.
const DIAL_PATIENCE: Duration = Duration::from_millis(200);

/// A pair of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Own end.
    pub local: SocketAddr,
    /// The peer's end.
    pub remote: SocketAddr,
}

/// The options that matter here.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// `connect-int`.
    pub connect_int: Duration,
    /// `socket-check-timeout`, or `ping-timeout` when that is 0.
    pub check: Duration,
    /// `sndbuf-size`, 0 for the system's choice.
    pub sndbuf: u32,
    /// `rcvbuf-size`, 0 for the system's choice.
    pub rcvbuf: u32,
}

/// What to do next.
#[derive(Debug)]
pub enum Action {
    /// Connect this socket; report with [`Dialer::dialed`] and the serial number.
    Dial {
        /// Bound socket.
        fd: Fd,
        /// Where to.
        to: SocketAddr,
        /// For the report.
        serial: u64,
    },
    /// Both sockets are there.
    Up {
        /// Data stream.
        data: Fd,
        /// Control stream.
        control: Fd,
        /// This node accepted the control stream.
        resolve_conflicts: bool,
    },
}

#[derive(Debug)]
enum Step {
    /// An outgoing connect runs.
    Dial { serial: u64, fd: Fd, path: usize, started: Time, until: Time },
    /// Both sockets exist; are they still alive then?
    Check { until: Time },
    /// Waiting for an incoming connection.
    Wait { until: Time },
}

#[derive(Debug)]
struct Socket {
    fd: Fd,
    path: usize,
}

/// The loop of one peer. Lives from `Connect` to `LinkUp` or `CloseLink`.
#[derive(Debug)]
pub struct Dialer {
    paths: Vec<Path>,
    path_next: usize,
    timing: Timing,
    step: Step,
    data: Option<Socket>,
    control: Option<Socket>,
    resolve_conflicts: bool,
    backlog: VecDeque<(Socket, Stream)>,
    wait: Duration,
    serial: u64,
    random: u64,
    /// Why the last attempt failed, told once.
    told: Option<String>,
}

impl Dialer {
    /// Begins. `random` seeds the jitter.
    pub fn new(paths: Vec<Path>, timing: Timing, now: Time, random: u64) -> Self {
        Self {
            paths,
            path_next: 0,
            timing,
            step: Step::Wait { until: now },
            data: None,
            control: None,
            resolve_conflicts: false,
            backlog: VecDeque::new(),
            wait: WAIT_FIRST,
            serial: 0,
            random: random | 1,
            told: None,
        }
    }

    /// The path an incoming connection belongs to.
    pub fn path_of(&self, local: SocketAddr, remote: std::net::IpAddr) -> Option<usize> {
        self.paths.iter().position(|p| p.local == local && p.remote.ip() == remote)
    }

    /// Own addresses to listen on.
    pub fn locals(&self) -> impl Iterator<Item = SocketAddr> {
        self.paths.iter().map(|p| p.local)
    }

    /// The path both sockets are on.
    pub fn established_path(&self) -> Option<Path> {
        self.data.as_ref().and_then(|s| self.paths.get(s.path).copied())
    }

    /// When to call [`Self::tick`].
    pub fn deadline(&self) -> Time {
        match self.step {
            Step::Dial { until, .. } | Step::Check { until } | Step::Wait { until } => until,
        }
    }

    fn coin(&mut self) -> bool {
        // xorshift64: jitter needs no more.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 40 & 1 == 0
    }

    /// Time passed.
    pub fn tick(&mut self, now: Time) -> Option<Action> {
        if now < self.deadline() {
            return None;
        }
        match &self.step {
            Step::Dial { fd, .. } => {
                sys::shutdown(fd.as_fd());
                self.failed(now, &io::ErrorKind::TimedOut.into())
            }
            Step::Check { .. } => self.check(now),
            Step::Wait { .. } => self.dial(now),
        }
    }

    /// Step 1: one outgoing attempt.
    fn dial(&mut self, now: Time) -> Option<Action> {
        // Once a socket is there, its path is the one.
        let path = self.data.as_ref().or(self.control.as_ref()).map_or(self.path_next, |s| s.path);
        let Some(pair) = self.paths.get(path).copied() else {
            self.step = Step::Wait { until: now + self.timing.connect_int };
            return None;
        };
        self.path_next = (path + 1) % self.paths.len();
        let fd = match sys::tcp_socket(pair.local.ip()) {
            Ok(fd) => Rc::new(fd),
            Err(e) => {
                self.wait = self.timing.connect_int.min(Duration::from_secs(1));
                return self.failed(now, &e);
            }
        };
        for (name, size) in [(libc::SO_SNDBUF, self.timing.sndbuf), (libc::SO_RCVBUF, self.timing.rcvbuf)] {
            if size > 0 {
                // Larger than the system allows is cut by the kernel, as for every program.
                let _ = sys::set_option(
                    fd.as_fd(),
                    libc::SOL_SOCKET,
                    name,
                    i32::try_from(size).unwrap_or(i32::MAX),
                );
            }
        }
        self.serial += 1;
        let (serial, to) = (self.serial, pair.remote);
        let until = now + self.timing.connect_int;
        self.step = Step::Dial { serial, fd: Rc::clone(&fd), path, started: now, until };
        Some(Action::Dial { fd, to, serial })
    }

    /// An outgoing connect ended.
    pub fn dialed(&mut self, now: Time, serial: u64, result: io::Result<()>) -> Option<Action> {
        let Step::Dial { serial: expected, fd, path, .. } = &self.step else { return None };
        if *expected != serial {
            return None;
        }
        let (fd, path) = (Rc::clone(fd), *path);
        let pair = self.paths.get(path).copied()?;
        let stream = match (&self.data, &self.control) {
            (None, None) if sys::compare_addresses(pair.local, pair.remote).is_gt() => Stream::Data,
            (None, None) | (Some(_), _) => Stream::Control,
            (None, Some(_)) => Stream::Data,
        };
        if let Err(e) = result.and_then(|()| sys::send_now(fd.as_fd(), &first_packet(stream))) {
            return self.failed(now, &e);
        }
        self.told = None;
        let socket = Socket { fd, path };
        match stream {
            Stream::Data => self.data = Some(socket),
            Stream::Control => {
                self.control = Some(socket);
                self.resolve_conflicts = false;
            }
        }
        self.check_later(now)
    }

    fn failed(&mut self, now: Time, error: &io::Error) -> Option<Action> {
        let text = error.to_string();
        if self.told.as_ref() != Some(&text) {
            tracing::debug!("connecting to the peer failed: {text}");
            self.told = Some(text);
        }
        self.wait_incoming(now)
    }

    /// Step 3: with both sockets, see in a while whether both are alive.
    fn check_later(&mut self, now: Time) -> Option<Action> {
        if self.data.is_some() && self.control.is_some() {
            self.step = Step::Check { until: now + self.timing.check };
            return None;
        }
        self.wait_incoming(now)
    }

    fn check(&mut self, now: Time) -> Option<Action> {
        let alive = |s: &Option<Socket>| s.as_ref().is_some_and(|s| sys::is_established(s.fd.as_fd()));
        if !alive(&self.data) {
            self.data = None;
        }
        if !alive(&self.control) {
            self.control = None;
        }
        if let (Some(data), Some(control)) = (&self.data, &self.control) {
            let resolve_conflicts = self.resolve_conflicts;
            return Some(Action::Up {
                data: Rc::clone(&data.fd),
                control: Rc::clone(&control.fd),
                resolve_conflicts,
            });
        }
        self.wait = WAIT_FIRST;
        self.wait_incoming(now)
    }

    /// Step 4.
    fn wait_incoming(&mut self, now: Time) -> Option<Action> {
        if let Some((socket, stream)) = self.backlog.pop_front() {
            return self.take(now, socket, stream);
        }
        let base = self.wait.min(self.timing.connect_int);
        self.wait = (self.wait * 2).min(self.timing.connect_int);
        let interval = if self.coin() { base * 6 / 7 } else { base * 8 / 7 };
        self.step = Step::Wait { until: now + interval };
        None
    }

    /// The peer opened a socket and said what it is.
    pub fn incoming(&mut self, now: Time, fd: Fd, path: usize, stream: Stream) -> Option<Action> {
        let socket = Socket { fd, path };
        match &self.step {
            Step::Wait { .. } => self.take(now, socket, stream),
            Step::Dial { fd, started, .. } if now >= *started + DIAL_PATIENCE => {
                sys::shutdown(fd.as_fd());
                self.take(now, socket, stream)
            }
            Step::Dial { .. } | Step::Check { .. } => {
                if self.backlog.len() == BACKLOG_MAX {
                    self.backlog.pop_front();
                }
                self.backlog.push_back((socket, stream));
                None
            }
        }
    }

    /// Step 5, then 3 and 1.
    fn take(&mut self, now: Time, socket: Socket, stream: Stream) -> Option<Action> {
        self.wait = WAIT_FIRST;
        let other_path = |s: &Option<Socket>| s.as_ref().is_some_and(|s| s.path != socket.path);
        if other_path(&self.data) || other_path(&self.control) {
            // Sockets of two paths: the newest path wins.
            self.data = None;
            self.control = None;
        }
        let place = match stream {
            Stream::Data => &mut self.data,
            Stream::Control => {
                self.resolve_conflicts = true;
                &mut self.control
            }
        };
        let crossed = place.replace(socket).is_some();
        if crossed && self.coin() {
            return self.wait_incoming(now);
        }
        if self.data.is_some() && self.control.is_some() {
            return self.check_later(now);
        }
        self.dial(now)
    }
}

/// The first packet on a socket, sent by whoever opened it (`spec/wire-protocol.md` §2.2).
fn first_packet(stream: Stream) -> [u8; 8] {
    let command = match stream {
        Stream::Data => 0xf2,
        Stream::Control => 0xf1,
    };
    [0x83, 0x74, 0x02, 0x67, 0xff, command, 0, 0]
}

/// What a first packet says.
#[must_use]
pub fn parse_first_packet(bytes: &[u8]) -> Option<Stream> {
    [Stream::Data, Stream::Control].into_iter().find(|s| bytes == first_packet(*s))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::OwnedFd;

    const TIMING: Timing = Timing {
        connect_int: Duration::from_secs(10),
        check: Duration::from_millis(500),
        sndbuf: 0,
        rcvbuf: 0,
    };

    fn pair() -> (Fd, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Rc::new(OwnedFd::from(listener.accept().unwrap().0)), far)
    }

    fn dialer(local: &str, remote: &str) -> Dialer {
        let paths = vec![Path { local: local.parse().unwrap(), remote: remote.parse().unwrap() }];
        Dialer::new(paths, TIMING, Time(0), 7)
    }

    fn at(ms: u64) -> Time {
        Time(ms * 1_000_000)
    }

    #[test]
    fn first_packets_are_those_of_the_specification() {
        assert_eq!(first_packet(Stream::Data), [0x83, 0x74, 0x02, 0x67, 0xff, 0xf2, 0, 0]);
        assert_eq!(parse_first_packet(&first_packet(Stream::Control)), Some(Stream::Control));
        assert_eq!(parse_first_packet(b"GET / HT"), None);
    }

    #[test]
    fn the_higher_address_opens_data_and_resolves_conflicts() {
        let mut d = dialer("127.0.0.2:7788", "127.0.0.1:7788");
        let Some(Action::Dial { serial, .. }) = d.tick(at(0)) else { panic!("dial") };
        let (ours, _far) = pair();
        if let Step::Dial { fd, .. } = &mut d.step {
            *fd = ours;
        }
        assert!(d.dialed(at(1), serial, Ok(())).is_none());
        assert!(d.data.is_some() && d.control.is_none());
        let (control, _far2) = pair();
        assert!(d.incoming(at(2), control, 0, Stream::Control).is_none());
        assert!(d.tick(at(400)).is_none(), "the check comes after ping-timeout");
        let Some(Action::Up { resolve_conflicts, .. }) = d.tick(at(502)) else { panic!("up") };
        assert!(resolve_conflicts);
    }

    #[test]
    fn a_dead_socket_is_found_by_the_check() {
        let mut d = dialer("127.0.0.1:7788", "127.0.0.2:7788");
        let ((data, _f1), (control, f2)) = (pair(), pair());
        let _ = d.incoming(at(0), data, 0, Stream::Data);
        d.control = Some(Socket { fd: control, path: 0 });
        d.step = Step::Check { until: at(500) };
        drop(f2);
        assert!(d.tick(at(600)).is_none());
        assert!(d.control.is_none() && d.data.is_some());
        assert!(matches!(d.step, Step::Wait { .. }));
    }

    #[test]
    fn retries_slow_down_to_connect_int() {
        let mut d = dialer("127.0.0.1:7788", "127.0.0.2:7788");
        let mut now = at(0);
        for _ in 0..12 {
            let Some(Action::Dial { serial, .. }) = d.tick(now) else { panic!("dial") };
            assert!(d.dialed(now, serial, Err(io::ErrorKind::ConnectionRefused.into())).is_none());
            let wait = d.deadline().since(now);
            assert!(wait <= TIMING.connect_int * 8 / 7, "{wait:?}");
            now = d.deadline();
        }
        assert!(now > at(30_000), "{now:?}");
    }

    #[test]
    fn an_incoming_socket_replaces_the_old_one() {
        let mut d = dialer("127.0.0.1:7788", "127.0.0.2:7788");
        let ((one, _f1), (two, _f2)) = (pair(), pair());
        let _ = d.incoming(at(0), one, 0, Stream::Data);
        d.step = Step::Wait { until: at(1000) };
        let _ = d.incoming(at(1), Rc::clone(&two), 0, Stream::Data);
        assert!(Rc::ptr_eq(&d.data.as_ref().unwrap().fd, &two));
    }
}
