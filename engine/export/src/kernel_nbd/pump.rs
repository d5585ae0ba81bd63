//! A thread between the socket of the kernel's NBD client and the engine's loop.

use crate::carried::Note;
use crate::channel::{Receiver, Sender, channel};
use crate::nbd::{InputBuf, Session};
use crate::{Errno, Reply, sys};
use bytes::{Buf, Bytes};
use std::collections::VecDeque;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

/// From the engine's loop to the thread.
enum Order {
    Complete(u64, Reply),
    Size(u64),
    Stop,
}

/// The running thread.
#[derive(Debug)]
pub(super) struct Pump {
    orders: Sender<Order>,
    thread: JoinHandle<()>,
}

impl std::fmt::Debug for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Complete(..) => "Complete",
            Self::Size(_) => "Size",
            Self::Stop => "Stop",
        })
    }
}

impl Pump {
    pub fn start<A: Send + 'static>(
        socket: OwnedFd,
        session: Session,
        notes: Sender<Note<A>>,
    ) -> io::Result<Self> {
        sys::set_nonblocking(socket.as_fd())?;
        let (orders, inbox) = channel()?;
        let flow = Flow { socket: socket.into(), session, inbox, output: VecDeque::new(), input: None };
        let thread = std::thread::Builder::new().name("nbd".into()).spawn(move || {
            if let Err(error) = sys::set_io_flusher() {
                tracing::warn!(%error, "The NBD thread is not exempt from waiting for block I/O.");
            }
            if let Some(reason) = flow.run(&notes) {
                notes.send(Note::Gone(reason));
            }
        })?;
        Ok(Self { orders, thread })
    }

    pub fn complete(&self, id: u64, reply: Reply) {
        self.orders.send(Order::Complete(id, reply));
    }

    pub fn set_size(&self, size: u64) {
        self.orders.send(Order::Size(size));
    }

    /// Ends the thread; what is unanswered gets an I/O error, and the socket is closed.
    pub fn stop(self) {
        self.orders.send(Order::Stop);
        if self.thread.join().is_err() {
            tracing::error!("The NBD thread has panicked.");
        }
    }
}

struct Flow {
    socket: UnixStream,
    session: Session,
    inbox: Receiver<Order>,
    output: VecDeque<Bytes>,
    input: Option<InputBuf>,
}

impl Flow {
    /// Runs until told to stop, or until the other end goes; gives the reason of the latter.
    fn run<A>(mut self, notes: &Sender<Note<A>>) -> Option<String> {
        loop {
            while let Some(order) = self.inbox.next() {
                match order {
                    Order::Complete(id, reply) => self.session.complete(id, reply),
                    Order::Size(size) => self.session.set_size(size),
                    Order::Stop => {
                        self.session.fail_all(Errno::Io);
                        // As much as the socket takes; what it does not take fails with the socket.
                        let _ = self.send();
                        return None;
                    }
                }
            }
            if let Err(error) = self.receive().and_then(|()| self.send()) {
                return Some(format!("the socket of the NBD client failed: {error}"));
            }
            while let Some(request) = self.session.next_request() {
                notes.send(Note::Request(request));
            }
            if let Some(why) = self.session.closed() {
                return Some(why.to_string());
            }
            let reading = if self.input.is_some() { libc::POLLIN } else { 0 };
            let writing = if self.output.is_empty() { 0 } else { libc::POLLOUT };
            let wanted = [(self.socket.as_fd(), reading | writing), (self.inbox.event_fd(), libc::POLLIN)];
            if let Err(error) = sys::poll(wanted) {
                return Some(format!("waiting for the NBD client failed: {error}"));
            }
        }
    }

    /// Reads while the socket has something and the session wants it.
    fn receive(&mut self) -> io::Result<()> {
        loop {
            self.input = self.input.take().or_else(|| self.session.take_input());
            let Some(mut input) = self.input.take() else { return Ok(()) };
            match (&self.socket).read(input.as_mut_slice()) {
                Ok(len) => self.session.give_input(input, len),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => self.input = Some(input),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.input = Some(input);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
            if self.session.closed().is_some() {
                return Ok(());
            }
        }
    }

    /// Writes while there is something and the socket takes it.
    fn send(&mut self) -> io::Result<()> {
        loop {
            self.output.extend(self.session.take_output());
            if self.output.is_empty() {
                return Ok(());
            }
            let parts: Vec<IoSlice<'_>> =
                self.output.iter().take(64).map(|part| IoSlice::new(part)).collect();
            match sys::write_all_of(self.socket.as_fd(), &parts, true) {
                Ok(len) => self.sent(len),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn sent(&mut self, mut len: usize) {
        while let Some(first) = self.output.front_mut() {
            if first.len() > len {
                first.advance(len);
                return;
            }
            len -= first.len();
            self.output.pop_front();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::nbd::{Export, Limits};
    use crate::{BufferPool, Op};
    use std::io::Write;

    fn next(notes: &Receiver<Note<()>>) -> Note<()> {
        loop {
            if let Some(note) = notes.next() {
                return note;
            }
            sys::poll([(notes.event_fd(), libc::POLLIN)]).unwrap();
        }
    }

    #[test]
    fn requests_and_answers_cross_the_thread() {
        let (ours, theirs) = sys::socket_pair().unwrap();
        let export = Export {
            name: String::new(),
            description: String::new(),
            size: 1 << 30,
            block_min: 512,
            block_preferred: 4096,
            read_only: false,
            discard: true,
            rotational: false,
        };
        let pool = BufferPool::new(0);
        let (sender, notes) = channel::<Note<()>>().unwrap();
        let session = Session::transmission(export, Limits::default(), pool.clone());
        let pump = Pump::start(ours, session, sender).unwrap();
        let mut client = UnixStream::from(theirs);

        // More than the socket holds, each way.
        let len: u32 = 8 << 20;
        let header = |command: u16, cookie: u64| {
            let mut out = vec![0x25, 0x60, 0x95, 0x13, 0, 0];
            out.extend_from_slice(&command.to_be_bytes());
            out.extend_from_slice(&cookie.to_be_bytes());
            out.extend_from_slice(&[0; 8]);
            out.extend_from_slice(&len.to_be_bytes());
            out
        };
        client.write_all(&header(1, 7)).unwrap();
        client.write_all(&vec![9; len as usize]).unwrap();
        let Note::Request(write) = next(&notes) else { unreachable!() };
        assert!(matches!(&write.op, Op::Write { data, .. } if data.len() == len as usize && data[5] == 9));
        pump.complete(write.id, Reply::Done);
        let mut reply = [0; 16];
        client.read_exact(&mut reply).unwrap();
        assert_eq!(reply, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);

        client.write_all(&header(0, 8)).unwrap();
        let Note::Request(read) = next(&notes) else { unreachable!() };
        let Op::Write { data, .. } = write.op else { unreachable!() };
        pump.complete(read.id, Reply::Data(data));
        let mut reply = vec![0; 16 + len as usize];
        client.read_exact(&mut reply).unwrap();
        assert!(reply[16..].iter().all(|byte| *byte == 9));

        // What waits when it stops fails, and then the stream ends.
        client.write_all(&header(0, 9)).unwrap();
        let Note::Request(_) = next(&notes) else { unreachable!() };
        pump.stop();
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 9]);
    }

    #[test]
    fn the_end_of_the_stream_is_told() {
        let (ours, theirs) = sys::socket_pair().unwrap();
        let export = Export {
            name: String::new(),
            description: String::new(),
            size: 4096,
            block_min: 512,
            block_preferred: 4096,
            read_only: true,
            discard: false,
            rotational: false,
        };
        let (sender, notes) = channel::<Note<()>>().unwrap();
        let session = Session::transmission(export, Limits::default(), BufferPool::new(0));
        let pump = Pump::start(ours, session, sender).unwrap();
        drop(theirs);
        assert!(matches!(next(&notes), Note::Gone(reason) if reason.contains("cut")));
        pump.stop();
    }
}
