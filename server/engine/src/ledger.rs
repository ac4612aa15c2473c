//! One account for each open request: it holds the request's sink and closes with its terminal event.
//!
//! That a request gets exactly one terminal event, and nothing after it, is structure here: the sink is
//! consumed with it, and accounts that nobody closed fail when the ledger goes.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::request::{EventSink, Failure, RequestEvent, RequestId, SinkState};

/// The accounts of the open requests.
#[derive(Default)]
pub(crate) struct Ledger {
    sinks: BTreeMap<RequestId, Box<dyn EventSink>>,
}

impl Ledger {
    /// Opens the account of a request.
    pub(crate) fn open(&mut self, request: RequestId, sink: Box<dyn EventSink>) {
        let other = self.sinks.insert(request, sink);
        assert!(other.is_none(), "request {request} is opened once");
    }

    /// Tells an open request that it is in a step for the first time.
    pub(crate) fn started(&mut self, request: RequestId) {
        self.sinks.get_mut(&request).expect("open requests start").started();
    }

    /// Hands over an event of an open request that is not its last.
    pub(crate) fn send(&mut self, request: RequestId, event: RequestEvent) -> SinkState {
        let sink = self.sinks.get_mut(&request).expect("events go to open requests");
        sink.send(event)
    }

    /// Hands over the terminal event of an open request.
    pub(crate) fn close(&mut self, request: RequestId, terminal: RequestEvent) {
        let mut sink = self.sinks.remove(&request).expect("a request is closed once");
        // Nothing follows: whether anybody still reads makes no difference.
        let _ = sink.send(terminal);
    }

    /// The open requests, oldest first.
    pub(crate) fn requests(&self) -> Vec<RequestId> {
        self.sinks.keys().copied().collect()
    }

    /// Fails every open request; returns how many there were.
    pub(crate) fn fail_all(&mut self, message: &str) -> usize {
        let sinks = std::mem::take(&mut self.sinks);
        let requests = sinks.len();
        for mut sink in sinks.into_values() {
            let failed = RequestEvent::Failed(Failure::of_engine(message));
            // A sink that panics, perhaps the one that brought the engine down, must not silence the others.
            let _ = catch_unwind(AssertUnwindSafe(|| sink.send(failed)));
        }
        requests
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.fail_all("the engine ended before the request did");
    }
}
