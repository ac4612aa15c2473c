//! `nibble generate`: text from one prompt, on the terminal.

use std::io::{ErrorKind, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, bail, ensure};
use clap::Args;
use nibble_engine::{
    Engine, EngineConfig, EventSink, Failure, FinishReason, ModelRunner, Request, RequestEvent,
    SamplingParameters, SinkState,
};
use nibble_kernels::Backend;
use nibble_model::chat_template::ChatInputs;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::detokenizer::Detokenizer;
use nibble_model::forward::BLOCK_SIZE;
use nibble_model::tokenizer::Tokenizer;
use serde_json::json;

use crate::device::{ModelArguments, Work, load, open_checkpoint};
use crate::output::{print_json, print_text};

/// Arguments of `nibble generate`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: nibble generate ./SmolLM2-135M-int4 --prompt \"What is the capital of France?\""
)]
pub(crate) struct GenerateArguments {
    /// A model directory, a GGUF file or a Hugging Face id.
    model: String,
    /// What to answer, or with --raw what to continue.
    #[arg(long)]
    prompt: String,
    /// Most tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// 0 takes the most likely token each time; higher values vary more.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Makes a temperature above 0 reproducible.
    #[arg(long)]
    seed: Option<u64>,
    /// Use the model's chat template, which is the default when it has one; an error when it has none.
    #[arg(long, conflicts_with = "raw")]
    chat: bool,
    /// Continue the prompt as it is.
    #[arg(long)]
    raw: bool,
    /// Print JSON at the end instead of text as it comes.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    run: ModelArguments,
}

/// Runs the command.
pub(crate) fn run(arguments: &GenerateArguments) -> anyhow::Result<()> {
    let checkpoint = open_checkpoint(&arguments.model)?;
    let tokenizer = Arc::new(checkpoint.tokenizer()?);
    let prompt = prompt_tokens(arguments, &checkpoint, &tokenizer)?;
    let prompt_tokens = prompt.len();
    let longest = checkpoint.config().max_position_embeddings;
    ensure!(
        prompt_tokens < longest,
        "the prompt has {prompt_tokens} tokens, and the model can hold {longest}; shorten the prompt"
    );
    let max_tokens = arguments.max_tokens.min(longest - prompt_tokens);
    let tokens = prompt_tokens + max_tokens;
    let device = arguments.run.device(checkpoint.config())?;
    let engine = device.run(StartEngine { checkpoint: &checkpoint, tokens })?;
    let sampling = SamplingParameters {
        max_tokens,
        temperature: arguments.temperature,
        seed: arguments.seed,
        ..SamplingParameters::default()
    };
    let (sender, events) = channel();
    engine.handle().submit(Request::new(prompt, sampling), Box::new(ChannelSink(sender)))?;
    let mut detokenizer = Detokenizer::new(tokenizer, true);
    let answer = receive(events, &mut detokenizer, |piece| {
        if arguments.json { Ok(Reader::Present) } else { print_piece(piece) }
    })?;
    engine.join()?;
    if arguments.json {
        return print_json(&json!({
            "text": answer.text,
            "token_ids": answer.token_ids,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "finish_reason": answer.finish_reason,
        }));
    }
    print_text("\n")
}

/// Loads a checkpoint for one sequence and starts an engine on it.
struct StartEngine<'a> {
    checkpoint: &'a Checkpoint,
    /// The longest sequence.
    tokens: usize,
}

impl Work for StartEngine<'_> {
    type Output = Engine;

    fn run<B: Backend + Send + 'static>(
        self,
        open: &dyn Fn() -> anyhow::Result<B>,
    ) -> anyhow::Result<Engine> {
        let model = load(self.checkpoint, open()?, self.tokens)?;
        let runner = ModelRunner::new(model, self.tokens.div_ceil(BLOCK_SIZE))?;
        Ok(Engine::start(Box::new(runner), EngineConfig::default())?)
    }
}

/// The tokens of the prompt: through the chat template unless the model has none or the user wants none.
fn prompt_tokens(
    arguments: &GenerateArguments,
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
) -> anyhow::Result<Vec<u32>> {
    let template = if arguments.raw { None } else { checkpoint.chat_template()? };
    let Some(template) = template else {
        ensure!(
            !arguments.chat,
            "the model in {} has no chat template; use --raw",
            checkpoint.path().display()
        );
        return Ok(tokenizer.encode(&arguments.prompt, true)?);
    };
    let text = template.render(&ChatInputs {
        messages: vec![json!({"role": "user", "content": arguments.prompt})],
        add_generation_prompt: true,
        ..ChatInputs::default()
    })?;
    Ok(tokenizer.encode(&text, false)?)
}

/// What was generated.
struct Answer {
    text: String,
    token_ids: Vec<u32>,
    completion_tokens: usize,
    finish_reason: &'static str,
}

/// Whether somebody still reads what is printed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reader {
    Present,
    /// It has seen enough, such as `head`.
    Gone,
}

/// Collects the answer and shows each piece of its text as it comes, until it ends or nobody reads it. Dropping
/// `events` at the end stops the engine's work for it.
fn receive(
    events: Receiver<RequestEvent>,
    detokenizer: &mut Detokenizer,
    mut show: impl FnMut(&str) -> anyhow::Result<Reader>,
) -> anyhow::Result<Answer> {
    let (mut text, mut token_ids) = (String::new(), Vec::new());
    loop {
        let event = events.recv().context("the engine stopped before the answer was finished")?;
        let ended = match event {
            RequestEvent::PromptLogprobs { .. } | RequestEvent::Embedding { .. } => continue,
            RequestEvent::Token { token_id, .. } => {
                token_ids.push(token_id);
                None
            }
            RequestEvent::Finished { reason, completion_tokens, .. } => Some((reason, completion_tokens)),
            RequestEvent::Failed(Failure { message, .. }) => bail!("the engine has failed: {message}"),
        };
        let piece = match (&ended, token_ids.last()) {
            (None, Some(&token_id)) => detokenizer.push(token_id)?,
            _ => detokenizer.finish()?,
        };
        text.push_str(&piece);
        if show(&piece)? == Reader::Gone {
            let completion_tokens = token_ids.len();
            return Ok(Answer { text, token_ids, completion_tokens, finish_reason: "abort" });
        }
        if let Some((reason, completion_tokens)) = ended {
            let finish_reason = match reason {
                FinishReason::Stop => "stop",
                FinishReason::Length => "length",
                FinishReason::Aborted => "abort",
            };
            return Ok(Answer { text, token_ids, completion_tokens, finish_reason });
        }
    }
}

/// Writes a piece of text to standard output at once.
fn print_piece(piece: &str) -> anyhow::Result<Reader> {
    let mut output = std::io::stdout();
    match output.write_all(piece.as_bytes()).and_then(|()| output.flush()) {
        Ok(()) => Ok(Reader::Present),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(error).context("cannot write the answer"),
    }
}

/// Puts the events of a request into a channel.
struct ChannelSink(Sender<RequestEvent>);

impl EventSink for ChannelSink {
    fn send(&mut self, event: RequestEvent) -> SinkState {
        match self.0.send(event) {
            Ok(()) => SinkState::Open,
            Err(_) => SinkState::Closed,
        }
    }
}
