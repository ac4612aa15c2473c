//! A client of OpenAI's API that takes the time of what it reads.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use reqwest::{RequestBuilder, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::workload::Prompt;
use super::{Endpoint, ServeArguments};

/// The server, and what all requests share.
#[derive(Clone)]
pub(super) struct Client {
    http: reqwest::Client,
    base: String,
    api_key: Option<String>,
    model: String,
    endpoint: Endpoint,
    ignore_eos: bool,
}

/// A request that succeeded.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) prompt_tokens: usize,
    pub(super) output_tokens: usize,
    /// From sending to the first text.
    pub(super) to_first_token: Duration,
    /// From sending to the end.
    pub(super) total: Duration,
    /// From each piece of text to the next.
    pub(super) between_tokens: Vec<Duration>,
}

#[derive(Deserialize)]
struct Models {
    data: Vec<ModelCard>,
}

#[derive(Deserialize)]
struct ModelCard {
    id: String,
}

/// What counts in an event of a stream; servers send more.
#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<ChunkChoice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct ChunkChoice {
    text: Option<String>,
    delta: Option<ChunkDelta>,
}

#[derive(Deserialize)]
struct ChunkDelta {
    content: Option<String>,
}

#[derive(Clone, Copy, Deserialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
}

impl Chunk {
    fn has_text(&self) -> bool {
        let text = |choice: &ChunkChoice| {
            let content = choice.delta.as_ref().and_then(|delta| delta.content.as_ref());
            choice.text.as_ref().or(content).is_some_and(|text| !text.is_empty())
        };
        self.choices.iter().any(text)
    }
}

impl Client {
    /// Asks the server for its model, unless the arguments name one.
    pub(super) async fn connect(arguments: &ServeArguments) -> anyhow::Result<Self> {
        let base = arguments.url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        // A connection for each request: servers close idle ones, llama-server just when they are used again.
        let http = reqwest::Client::builder().tcp_nodelay(true).pool_max_idle_per_host(0).build()?;
        let mut client = Self {
            http,
            base,
            api_key: arguments.api_key.clone(),
            model: String::new(),
            endpoint: arguments.endpoint,
            ignore_eos: arguments.ignore_eos,
        };
        client.model = match &arguments.model {
            Some(model) => model.clone(),
            None => {
                let url = format!("{}/v1/models", client.base);
                let response = client.send(client.http.get(&url)).await?;
                let models: Models = response
                    .json()
                    .await
                    .with_context(|| format!("{url} did not answer with a list of models"))?;
                let first = models.data.into_iter().next();
                first.with_context(|| format!("{url} lists no model; give --model"))?.id
            }
        };
        Ok(client)
    }

    /// The model that requests name.
    pub(super) fn model(&self) -> &str {
        &self.model
    }

    /// Sends `prompt` and reads the answer to its end.
    pub(super) async fn answer(&self, prompt: &Prompt) -> anyhow::Result<Answer> {
        let mut body = json!({
            "model": self.model,
            "max_tokens": prompt.max_tokens,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if self.ignore_eos {
            body["ignore_eos"] = true.into();
        }
        let path = match self.endpoint {
            Endpoint::Completions => {
                body["prompt"] = prompt.text.as_str().into();
                "/v1/completions"
            }
            Endpoint::Chat => {
                body["messages"] = json!([{"role": "user", "content": prompt.text}]);
                "/v1/chat/completions"
            }
        };
        let sent_at = Instant::now();
        let request = self.http.post(format!("{}{path}", self.base)).json(&body);
        let mut response = self.send(request).await?;
        let mut events = EventReader::default();
        let mut texts_at = Vec::new();
        let mut usage = None;
        while let Some(bytes) = response.chunk().await.context("the stream broke off")? {
            let read_at = Instant::now();
            events.push(&bytes);
            while let Some(event) = events.next() {
                if event == b"[DONE]" {
                    continue;
                }
                let chunk: Chunk = serde_json::from_slice(&event)
                    .with_context(|| format!("not a chunk: {}", String::from_utf8_lossy(&event)))?;
                if let Some(error) = chunk.error {
                    bail!("an error inside the stream: {error}");
                }
                if chunk.has_text() {
                    texts_at.push(read_at);
                }
                usage = chunk.usage.or(usage);
            }
        }
        let total = sent_at.elapsed();
        let usage = usage.context("the stream had no usage, although stream_options asked for it")?;
        Ok(Answer {
            prompt_tokens: usage.prompt_tokens,
            output_tokens: usage.completion_tokens,
            // An answer without text has its end for a first token.
            to_first_token: texts_at.first().map_or(total, |first| first.duration_since(sent_at)),
            total,
            between_tokens: texts_at.windows(2).map(|pair| pair[1].duration_since(pair[0])).collect(),
        })
    }

    /// Sends `request`; a status that is no success is an error with its body.
    async fn send(&self, request: RequestBuilder) -> anyhow::Result<Response> {
        let request = match &self.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let response = request.send().await.with_context(|| format!("cannot reach {}", self.base))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let (status, url) = (response.status(), response.url().clone());
        bail!("{url} answered {status}: {}", response.text().await.unwrap_or_default().trim());
    }
}

/// Takes the data of server-sent events out of bytes, wherever these are cut.
#[derive(Default)]
struct EventReader {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were read.
    read: usize,
}

impl EventReader {
    fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.read);
        self.read = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The data of the next complete line that has any; comments and empty lines have none.
    fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let rest = &self.buffer[self.read..];
            let end = rest.iter().position(|&byte| byte == b'\n')?;
            let line = rest[..end].strip_suffix(b"\r").unwrap_or(&rest[..end]);
            let data = line.strip_prefix(b"data:").map(|data| data.trim_ascii_start().to_vec());
            self.read += end + 1;
            if data.is_some() {
                return data;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_wherever_the_bytes_are_cut() {
        let stream = b": still working\n\ndata: {\"a\": 1}\n\ndata:[2]\r\n\r\nevent: x\ndata: [DONE]\n\n";
        for cut in 0..=stream.len() {
            let (mut reader, mut events) = (EventReader::default(), Vec::new());
            for part in [&stream[..cut], &stream[cut..]] {
                reader.push(part);
                events.extend(std::iter::from_fn(|| reader.next()));
            }
            assert_eq!(events, [&b"{\"a\": 1}"[..], b"[2]", b"[DONE]"], "cut at {cut}");
        }
    }

    #[test]
    fn text_is_what_counts_as_a_token() {
        let has_text = |chunk: &str| serde_json::from_str::<Chunk>(chunk).unwrap().has_text();
        assert!(has_text(r#"{"choices": [{"text": "a", "index": 0}]}"#));
        assert!(has_text(r#"{"choices": [{"delta": {"content": "a"}}]}"#));
        assert!(!has_text(r#"{"choices": [{"delta": {"role": "assistant", "content": ""}}]}"#));
        assert!(!has_text(r#"{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}"#));
    }
}
