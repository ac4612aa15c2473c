//! Ten thousand requests of random lengths over real sockets, many of which end early: nothing may be left.
//!
//! Alone in its program: other tests would change the memory, the tasks and the open files that it measures.

#[allow(dead_code, reason = "the API's tests use the rest")]
#[path = "api/support.rs"]
mod support;

use std::alloc::System;
use std::collections::BTreeMap;
use std::time::Duration;

use nibble_engine::EngineConfig;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use support::{CHAT, COMPLETIONS, Options, Server};

const REQUESTS: u64 = 10_000;
const AT_ONCE: usize = 64;

/// Counts what Rust allocates. Resident memory would not do: it grows by megabytes as threads and sizes meet for the
/// first time in the allocator, while what the program holds stays as it is.
#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// What the program holds on its heap.
#[derive(Clone, Copy, Debug)]
struct Held {
    bytes: usize,
    allocations: usize,
}

/// What the second half of the requests may add. Measured in 22 runs, half of them on a busy machine: -1.8 to 7.5 KiB in
/// -11 to 62 allocations, and no more after 20,000 requests: rare sizes of queues and maps. Each fate has about
/// 250 requests or more in a half: an allocation that one kind of them leaves behind is found, however small it is.
const GROWTH: Held = Held { bytes: 64 << 10, allocations: 200 };

/// What the client of a request does after sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    ReadsToTheEnd,
    LeavesAtOnce,
    LeavesInTheMiddle,
    SendsHalfARequest,
    SendsNonsense,
}

/// The request of `seed`, and what becomes of it.
fn draw(seed: u64) -> (Fate, &'static str, Value, StdRng) {
    let mut random = StdRng::seed_from_u64(seed);
    let fate = match random.random_range(0..20) {
        0..10 => Fate::ReadsToTheEnd,
        10..13 => Fate::LeavesAtOnce,
        13..18 => Fate::LeavesInTheMiddle,
        18 => Fate::SendsHalfARequest,
        _ => Fate::SendsNonsense,
    };
    // Few different ones: the tokenizer remembers up to ten thousand texts, which is no leak but would look like one.
    let alphabet = ('a'..='z').cycle().skip(random.random_range(0..4));
    let prompt: String = alphabet.take(random.random_range(1..120)).collect();
    let mut body = json!({
        "max_tokens": random.random_range(1..120),
        "temperature": random.random_range(0..2),
        "seed": seed,
        "n": random.random_range(1..=3),
        "stream": random.random::<bool>(),
        "ignore_eos": random.random::<bool>(),
    });
    let path = match random.random() {
        true => {
            body["prompt"] = prompt.into();
            COMPLETIONS
        }
        false => {
            body["messages"] = json!([{"role": "user", "content": prompt}]);
            CHAT
        }
    };
    if fate == Fate::SendsNonsense {
        body["max_tokens"] = "many".into();
    }
    (fate, path, body, random)
}

/// Sends the request of `seed`; returns its fate, and the status of an answer that was read to its end.
async fn request(address: String, seed: u64) -> (Fate, Option<u16>) {
    let (fate, path, body, mut random) = draw(seed);
    let streams = body["stream"] == true;
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: soak\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    let request = head + &body;
    let sent = match fate {
        Fate::SendsHalfARequest => &request[..random.random_range(1..request.len())],
        _ => &request,
    };
    let mut connection = TcpStream::connect(address).await.unwrap();
    connection.write_all(sent.as_bytes()).await.unwrap();
    match fate {
        Fate::SendsHalfARequest | Fate::LeavesAtOnce => {}
        Fate::LeavesInTheMiddle if streams => {
            let _ = connection.read(&mut [0; 256]).await.unwrap();
        }
        Fate::LeavesInTheMiddle => {
            tokio::time::sleep(Duration::from_micros(random.random_range(0..3000))).await;
        }
        Fate::ReadsToTheEnd | Fate::SendsNonsense => {
            let mut answer = String::new();
            connection.read_to_string(&mut answer).await.unwrap();
            let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
            let whole = !streams || status != 200 || answer.contains("data: [DONE]");
            assert!(whole, "the stream of request {seed} broke off: {answer}");
            return (fate, Some(status));
        }
    }
    (fate, None)
}

/// The server's own: one for its life, one accepts connections, one waits for SIGHUP.
const SERVER_TASKS: usize = 3;

/// How often each outcome was seen.
type Outcomes = BTreeMap<(Fate, Option<u16>), u64>;

/// Sends the requests of `seeds`, [`AT_ONCE`] of them at a time.
async fn load(address: &str, seeds: std::ops::Range<u64>, outcomes: &mut Outcomes) {
    let mut requests = JoinSet::new();
    for seed in seeds {
        if requests.len() == AT_ONCE {
            *outcomes.entry(requests.join_next().await.unwrap().unwrap()).or_default() += 1;
        }
        requests.spawn(request(address.to_owned(), seed));
    }
    for outcome in requests.join_all().await {
        *outcomes.entry(outcome).or_default() += 1;
    }
}

async fn is_idle(server: &Server) {
    server
        .eventually("nothing runs, nothing waits, no block is held", |stats| {
            stats.running == 0 && stats.waiting == 0 && stats.kv_blocks_used == 0
        })
        .await;
}

/// Waits until `count` is down to `expected`.
async fn comes_back_to(expected: usize, what: &str, count: impl Fn() -> usize) {
    for _ in 0..1000 {
        if count() <= expected {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{} {what} are left, {expected} were there before", count());
}

fn alive_tasks() -> usize {
    Handle::current().metrics().num_alive_tasks()
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn held() -> Held {
    let stats = ALLOCATOR.stats();
    Held {
        bytes: stats.bytes_allocated - stats.bytes_deallocated,
        allocations: stats.allocations - stats.deallocations,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_of_ten_thousand_requests_that_end_in_every_way() {
    // A short queue, and 64 blocks for 64 clients: requests are refused, and sequences preempted. Without a time for
    // its steps the model would be done before anybody can leave.
    let engine = EngineConfig { max_waiting_requests: 110, ..EngineConfig::default() };
    let step_time = Duration::from_micros(100);
    let server = Server::with(Options { engine, step_time, ..Options::default() });
    let address = server.listen().await;
    let mut outcomes = Outcomes::new();
    load(&address, 0..1, &mut outcomes).await;
    is_idle(&server).await;
    comes_back_to(SERVER_TASKS, "tasks", alive_tasks).await;
    let files = open_files();

    load(&address, 1..REQUESTS / 2, &mut outcomes).await;
    is_idle(&server).await;
    comes_back_to(SERVER_TASKS, "tasks", alive_tasks).await;
    let half = held();
    load(&address, REQUESTS / 2..REQUESTS, &mut outcomes).await;
    is_idle(&server).await;
    comes_back_to(SERVER_TASKS, "tasks", alive_tasks).await;
    comes_back_to(files, "open files", open_files).await;
    let end = held();
    let bytes = end.bytes.saturating_sub(half.bytes);
    let allocations = end.allocations.saturating_sub(half.allocations);
    let bounded = bytes < GROWTH.bytes && allocations < GROWTH.allocations;
    assert!(bounded, "the second half added {bytes} bytes in {allocations} allocations to {half:?}");

    assert_eq!(outcomes.values().sum::<u64>(), REQUESTS);
    let of = |fate, status| outcomes.get(&(fate, status)).copied().unwrap_or(0);
    assert!(of(Fate::ReadsToTheEnd, Some(200)) > 1000, "{outcomes:?}");
    let read = [200, 429].map(|status| of(Fate::ReadsToTheEnd, Some(status))).iter().sum::<u64>();
    let all_read: u64 =
        outcomes.iter().filter(|((fate, _), _)| *fate == Fate::ReadsToTheEnd).map(|(_, n)| n).sum();
    assert_eq!(read, all_read, "answered or told to come back: {outcomes:?}");
    assert!(of(Fate::SendsNonsense, Some(400)) > 100, "{outcomes:?}");
    let stats = server.engine.stats();
    let ended = [stats.finished.aborted, stats.finished.length, stats.finished.stop];
    assert!(ended.iter().all(|count| *count > 500), "aborted, by length, by a stop: {ended:?}");
    assert!(stats.preemptions > 0, "no sequence was preempted");
    assert_eq!(stats.finished.failed, 0);
}
