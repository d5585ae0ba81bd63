//! From a backend's threads to the engine's loop: a queue whose arrivals make a descriptor readable.

use crate::sys::EventFd;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc;

/// The sending end, one per thread. What travels is bounded by the senders: requests by their limit of
/// unanswered ones, results by one operation at a time.
#[derive(Debug)]
pub(crate) struct Sender<T> {
    queue: mpsc::Sender<T>,
    arrival: Arc<EventFd>,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), arrival: Arc::clone(&self.arrival) }
    }
}

impl<T> Sender<T> {
    /// Queues a value; when the receiver is gone nobody wants it.
    pub fn send(&self, value: T) {
        if self.queue.send(value).is_ok() {
            self.arrival.signal();
        }
    }

    /// The descriptor that arrivals make readable.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.arrival.as_fd()
    }
}

/// The receiving end.
#[derive(Debug)]
pub(crate) struct Receiver<T> {
    queue: mpsc::Receiver<T>,
    arrival: Arc<EventFd>,
}

impl<T> Receiver<T> {
    /// The next value, or none; then the descriptor is quiet until the next arrival.
    pub fn next(&self) -> Option<T> {
        self.queue.try_recv().ok().or_else(|| {
            self.arrival.clear();
            // What arrived between the two lines has signalled before, or is seen here.
            self.queue.try_recv().ok()
        })
    }

    /// Readable while values wait.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.arrival.as_fd()
    }
}

/// A queue with its two ends.
pub(crate) fn channel<T>() -> io::Result<(Sender<T>, Receiver<T>)> {
    let arrival = Arc::new(EventFd::new()?);
    let (sender, receiver) = mpsc::channel();
    let sender = Sender { queue: sender, arrival: Arc::clone(&arrival) };
    Ok((sender, Receiver { queue: receiver, arrival }))
}
