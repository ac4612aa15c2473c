//! From requests as they were sent to requests that can be run: [`ValidRequest`] is made here only.
//!
//! Rendering a template and tokenizing take time that grows with the text: these functions belong on a thread
//! that may block.

mod presentation;
mod prompts;
mod sampling;

use std::sync::Arc;

use nibble_engine::{Pooling, Request, SamplingParameters, SubmitError, TokenConstraint};

use crate::app::AppState;
use crate::auth::Tenant;
use crate::grammar::Grammar;
use crate::openai::error::ApiError;
use crate::openai::types::chat::ChatRequest;
use crate::openai::types::completions::{CompletionRequest, Prompts};
use crate::openai::types::embeddings::{EmbeddingRequest, PoolingField};
use crate::openai::types::sampling::{GenerationFields, StreamOptions};
use crate::openai::types::structured::StructuredOutput;
use crate::reasoning::{Reasoning, Thinking};
use crate::tools::Tools;

pub(crate) use presentation::Presentation;
pub(crate) use prompts::Prompt;
use prompts::{Truncation, conversation, text_offsets};
use sampling::{check_prompt_logprobs, logprobs, sampling, stop_strings};

/// Most choices of one request, over all of its prompts.
const MAXIMUM_CHOICES: usize = 1024;
/// Tokens of a completion that does not say how many, as OpenAI has it.
const DEFAULT_COMPLETION_TOKENS: usize = 16;
/// Most choices of one request with a structured output: each has a parser of its own.
const MAXIMUM_STRUCTURED_CHOICES: usize = 128;
/// Most bytes of a request's name or salt.
const MAXIMUM_NAME_BYTES: usize = 256;

/// A request that passed every check this side of the engine.
#[derive(Debug)]
pub(crate) struct ValidRequest {
    prompts: Vec<Prompt>,
    /// Of the first choice of the first prompt; the others differ in their seeds.
    sampling: SamplingParameters,
    /// What each completion must be, at its beginning.
    constraint: Option<Box<dyn TokenConstraint>>,
    /// The tools that the model may call.
    tools: Option<Tools>,
    /// Where the model thinks, if it is known how it does.
    thinking: Option<Thinking>,
    /// An embedding is wanted, not a completion.
    pooling: Option<Pooling>,
    choices_per_prompt: usize,
    stop: Vec<String>,
    include_stop: bool,
    skip_special_tokens: bool,
    delivery: Delivery,
    presentation: Presentation,
    request_id: Option<String>,
    priority: i32,
    cache_salt: Option<Arc<str>>,
    /// The field that the prompts came from.
    prompt_field: &'static str,
}

/// How the answer is delivered.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Delivery {
    /// As one body.
    Whole,
    /// As a stream of events.
    Stream {
        /// Whether and when the usage is reported.
        options: StreamOptions,
    },
}

impl ValidRequest {
    /// Checks and tokenizes a completion request.
    pub(crate) fn completion(state: &AppState, request: CompletionRequest) -> Result<Self, ApiError> {
        const FIELD: &str = "prompt";
        let model = &state.model;
        let CompletionRequest { generation: mut fields, prompt, echo, logprobs: asked, add_special_tokens } =
            request;
        model.check_name(fields.model.as_deref())?;
        let mut sampling = sampling(&fields, &model.generation_config, &model.tokenizer)?;
        sampling.logprobs = asked.map(|count| logprobs("logprobs", count)).transpose()?;
        let presentation =
            Presentation::new(&fields, echo, &mut sampling, model.engine.limits().vocabulary_size)?;
        let max_tokens = fields.max_tokens.map_or(DEFAULT_COMPLETION_TOKENS, |tokens| tokens as usize);
        if max_tokens == 0 && echo {
            // The engine generates nothing only for who wants to know something about the prompt.
            sampling.prompt_logprobs.get_or_insert(0);
        }
        let truncation =
            Truncation::new(fields.truncate_prompt_tokens, model.engine.maximum_tokens(), max_tokens)?;
        let of_tokens = |mut token_ids: Vec<u32>, text: Option<String>| {
            let is_cut = truncation.apply(&mut token_ids);
            let skips = fields.skip_special_tokens;
            let echo = match text.filter(|_| !is_cut) {
                _ if !echo => String::new(),
                Some(text) => text,
                None => model.tokenizer.decode(&token_ids, skips)?,
            };
            let text_offsets = if presentation.echo && presentation.logprobs.is_some() {
                text_offsets(&model.tokenizer, &token_ids, skips)?
            } else {
                Vec::new()
            };
            Ok::<_, ApiError>(Prompt { token_ids, echo, text_offsets, max_tokens })
        };
        let of_text =
            |text: String| of_tokens(model.tokenizer.encode(&text, add_special_tokens)?, Some(text));
        let prompts: Result<Vec<_>, ApiError> = match prompt {
            Prompts::Text(text) => Ok(vec![of_text(text)?]),
            Prompts::Texts(texts) => texts.into_iter().map(of_text).collect(),
            Prompts::Tokens(tokens) => Ok(vec![of_tokens(tokens, None)?]),
            Prompts::TokenLists(lists) => lists.into_iter().map(|tokens| of_tokens(tokens, None)).collect(),
        };
        let structured = fields.structured.take();
        let mut request = Self::new(state, prompts?, fields, sampling, presentation, FIELD)?;
        if let Some(StructuredOutput { grammar, param }) = structured {
            request.constrain(state, grammar, param)?;
        }
        Ok(request)
    }

    /// Checks a chat completion request, puts it into the model's form and tokenizes it.
    pub(crate) fn chat(state: &AppState, mut request: ChatRequest) -> Result<Self, ApiError> {
        const FIELD: &str = "messages";
        let model = &state.model;
        model.check_name(request.generation.model.as_deref())?;
        let mut sampling = sampling(&request.generation, &model.generation_config, &model.tokenizer)?;
        sampling.logprobs = match (request.logprobs, request.top_logprobs) {
            (true, count) => Some(logprobs("top_logprobs", count.unwrap_or(0))?),
            (false, None | Some(0)) => None,
            (false, Some(count)) => {
                return Err(ApiError::invalid("top_logprobs", count, "logprobs to be true beside it"));
            }
        };
        let vocabulary_size = model.engine.limits().vocabulary_size;
        // An echo of a chat is that of its last message, without log probabilities.
        let mut presentation = Presentation::new(&request.generation, false, &mut sampling, vocabulary_size)?;
        presentation.reasoning = request.include_reasoning;
        let tools = Tools::new(
            state.tool_call_format,
            &request.tools,
            request.tool_choice.as_ref(),
            request.parallel_tool_calls,
        )?;
        let structured = request.generation.structured.take();
        let conversation = conversation(state, &mut request, tools.is_some())?;
        let thinking = state.reasoning.as_ref().map(|reasoning| reasoning.after_prompt(&conversation.text));
        let mut fields = request.generation;
        // Tags of calls and thoughts may be special tokens.
        let shows_tags = tools.is_some() || state.reasoning.as_ref().is_some_and(Reasoning::are_special);
        fields.skip_special_tokens &= !shows_tags;
        let grammar = chat_grammar(structured, tools.as_ref())?;
        let mut token_ids = model.tokenizer.encode(&conversation.text, request.add_special_tokens)?;
        let maximum_tokens = model.engine.maximum_tokens();
        let asked = match request.max_completion_tokens.or(fields.max_tokens) {
            Some(0) if request.max_completion_tokens.is_some() => {
                return Err(ApiError::invalid("max_completion_tokens", 0, "at least 1"));
            }
            asked => asked.map(|tokens| tokens as usize),
        };
        Truncation::new(fields.truncate_prompt_tokens, maximum_tokens, asked.unwrap_or(1))?
            .apply(&mut token_ids);
        // What fits; one at least, so that a prompt which fills everything is refused for its length.
        let max_tokens = asked.unwrap_or(maximum_tokens.saturating_sub(token_ids.len()).max(1));
        let echo = conversation.last_of_assistant.filter(|_| request.echo).unwrap_or_default();
        let prompt = Prompt { token_ids, echo, text_offsets: Vec::new(), max_tokens };
        let mut request = Self::new(state, vec![prompt], fields, sampling, presentation, FIELD)?;
        request.thinking = thinking;
        if let Some((grammar, param)) = grammar {
            request.constrain(state, grammar, param)?;
        }
        request.tools = tools;
        Ok(request)
    }

    /// Checks and tokenizes an embedding request.
    pub(crate) fn embedding(state: &AppState, request: EmbeddingRequest) -> Result<Self, ApiError> {
        let model = &state.model;
        model.check_name(request.model.as_deref())?;
        let truncation = Truncation::new(request.truncate_prompt_tokens, model.engine.maximum_tokens(), 0)?;
        let of_tokens = |mut token_ids: Vec<u32>| {
            truncation.apply(&mut token_ids);
            Prompt { token_ids, echo: String::new(), text_offsets: Vec::new(), max_tokens: 0 }
        };
        let encode = |text: String| model.tokenizer.encode(&text, request.add_special_tokens);
        let inputs = request.input.token_ids(encode)?.into_iter().map(of_tokens).collect();
        let fields = GenerationFields {
            request_id: request.request_id,
            cache_salt: request.cache_salt,
            priority: request.priority,
            ..GenerationFields::default()
        };
        let nothing = SamplingParameters { max_tokens: 0, ..SamplingParameters::default() };
        let mut valid = Self::new(state, inputs, fields, nothing, Presentation::default(), "input")?;
        valid.pooling = Some(match request.pooling {
            Some(PoolingField::Mean) => Pooling::Mean,
            Some(PoolingField::Last) => Pooling::Last,
            None => model.pooling,
        });
        Ok(valid)
    }

    /// Demands that completions are texts of `grammar`, which comes from the field `param`; after what the model
    /// thinks.
    fn constrain(&mut self, state: &AppState, grammar: Grammar, param: &str) -> Result<(), ApiError> {
        if self.sampling.ignore_eos {
            let expected = "false beside a structured output, whose end is an end-of-sequence token";
            return Err(ApiError::invalid("ignore_eos", true, expected));
        }
        let choices = self.prompts.len() * self.choices_per_prompt;
        if choices > MAXIMUM_STRUCTURED_CHOICES {
            let found = format!("{} for {} prompts", self.choices_per_prompt, self.prompts.len());
            let expected =
                format!("at most {MAXIMUM_STRUCTURED_CHOICES} choices in all with a structured output");
            return Err(ApiError::invalid("n", found, expected));
        }
        let constraint = state.grammars.compile(grammar).map_err(|error| {
            let message = format!("{param} cannot be followed: {error}");
            ApiError::InvalidField { param: param.to_owned(), message }
        })?;
        self.constraint = Some(match (self.thinking, &state.reasoning) {
            (Some(thinking), Some(reasoning)) => reasoning.constraint(thinking, constraint),
            _ => constraint,
        });
        Ok(())
    }

    fn new(
        state: &AppState,
        prompts: Vec<Prompt>,
        fields: GenerationFields,
        sampling: SamplingParameters,
        presentation: Presentation,
        prompt_field: &'static str,
    ) -> Result<Self, ApiError> {
        let choices_per_prompt = fields.n.unwrap_or(1) as usize;
        let choices = prompts.len().saturating_mul(choices_per_prompt);
        if choices_per_prompt == 0 || choices_per_prompt > MAXIMUM_CHOICES {
            return Err(ApiError::invalid("n", choices_per_prompt, format!("from 1 to {MAXIMUM_CHOICES}")));
        }
        if choices == 0 || choices > MAXIMUM_CHOICES {
            let found = format!("a list of {} prompts for {choices_per_prompt} choices each", prompts.len());
            let expected = format!("from 1 to {MAXIMUM_CHOICES} choices in all");
            return Err(ApiError::invalid(prompt_field, found, expected));
        }
        let maximum_tokens = state.model.engine.maximum_tokens();
        for prompt in &prompts {
            if prompt.token_ids.len().saturating_add(prompt.max_tokens) > maximum_tokens {
                let (prompt_tokens, max_tokens) = (prompt.token_ids.len(), prompt.max_tokens);
                let error = SubmitError::TooLong { prompt_tokens, max_tokens, maximum_tokens };
                return Err(ApiError::submit(error, prompt_field));
            }
            if sampling.min_tokens > prompt.max_tokens {
                let expected = format!("at most max_tokens, {}", prompt.max_tokens);
                return Err(ApiError::invalid("min_tokens", sampling.min_tokens, expected));
            }
        }
        let prompt_tokens = prompts.iter().map(|prompt| prompt.token_ids.len()).sum::<usize>();
        let scored_tokens = prompt_tokens.saturating_mul(choices_per_prompt);
        check_prompt_logprobs(presentation.prompt_logprobs, scored_tokens)?;
        let delivery = delivery(&fields)?;
        if fields.priority != 0 && !state.options.priorities {
            let expected =
                "0 where all requests are equal; start the server with --scheduling-policy priority";
            return Err(ApiError::invalid("priority", fields.priority, expected));
        }
        Ok(Self {
            prompts,
            sampling,
            constraint: None,
            tools: None,
            thinking: None,
            pooling: None,
            choices_per_prompt,
            include_stop: fields.include_stop_str_in_output,
            skip_special_tokens: fields.skip_special_tokens,
            delivery,
            presentation,
            request_id: name("request_id", fields.request_id)?,
            priority: fields.priority,
            cache_salt: name("cache_salt", fields.cache_salt)?.map(Arc::from),
            stop: stop_strings(fields.stop)?,
            prompt_field,
        })
    }

    /// The prompts, in the order of the choices.
    pub(crate) fn prompts(&self) -> &[Prompt] {
        &self.prompts
    }

    /// Choices of each prompt.
    pub(crate) fn choices_per_prompt(&self) -> usize {
        self.choices_per_prompt
    }

    /// What the engine runs for a choice of a prompt. With a seed, each choice has its own: seed, seed + 1, ...
    ///
    /// The log probabilities of the prompt are those of all its choices, computed with the first one; `None` for the
    /// others if nothing else is wanted.
    pub(crate) fn engine_request(&self, prompt: &Prompt, choice: usize, tenant: &Tenant) -> Option<Request> {
        let (priority, cache_salt) = (self.priority, self.cache_salt.clone());
        let tenant = Arc::clone(&tenant.0);
        if let Some(pooling) = self.pooling {
            let request = Request::embedding(prompt.token_ids.clone(), pooling);
            return Some(Request { priority, tenant, cache_salt, ..request });
        }
        if choice > 0 && prompt.max_tokens == 0 {
            return None;
        }
        let mut sampling = self.sampling.clone();
        sampling.seed = sampling.seed.map(|seed| seed.wrapping_add(choice as u64));
        sampling.max_tokens = prompt.max_tokens;
        sampling.prompt_logprobs = sampling.prompt_logprobs.filter(|_| choice == 0);
        Some(Request {
            constraint: self.constraint.clone(),
            priority,
            tenant,
            cache_salt,
            ..Request::new(prompt.token_ids.clone(), sampling)
        })
    }

    /// Whether log probabilities of the prompts are wanted.
    pub(crate) fn scores_prompts(&self) -> bool {
        self.sampling.prompt_logprobs.is_some()
    }

    /// The tools that the model may call.
    pub(crate) fn tools(&self) -> Option<&Tools> {
        self.tools.as_ref()
    }

    /// Where the model thinks, if it is known how it does.
    pub(crate) fn thinking(&self) -> Option<Thinking> {
        self.thinking
    }

    /// What is shown beside the text.
    pub(crate) fn presentation(&self) -> Presentation {
        self.presentation
    }

    /// The name that the client gave to the request, else `given`.
    pub(crate) fn id<'a>(&'a self, given: &'a str) -> &'a str {
        self.request_id.as_deref().unwrap_or(given)
    }

    /// Stop strings, none of them empty.
    pub(crate) fn stop(&self) -> &[String] {
        &self.stop
    }

    /// Whether the stop string or token belongs to the text.
    pub(crate) fn include_stop(&self) -> bool {
        self.include_stop
    }

    /// Tokens before which no stop string is looked for.
    pub(crate) fn min_tokens(&self) -> usize {
        self.sampling.min_tokens
    }

    /// Whether special tokens are left out of the text.
    pub(crate) fn skip_special_tokens(&self) -> bool {
        self.skip_special_tokens
    }

    /// How the answer is delivered.
    pub(crate) fn delivery(&self) -> Delivery {
        self.delivery
    }

    /// The field that the prompts came from.
    pub(crate) fn prompt_field(&self) -> &'static str {
        self.prompt_field
    }
}

/// A text that names something; neither empty nor long.
fn name(field: &str, text: Option<String>) -> Result<Option<String>, ApiError> {
    match text {
        Some(text) if text.is_empty() || text.len() > MAXIMUM_NAME_BYTES => {
            let found = format!("a string of {} bytes", text.len());
            Err(ApiError::invalid(field, found, format!("a string of 1 to {MAXIMUM_NAME_BYTES} bytes")))
        }
        text => Ok(text),
    }
}

/// What the answer of a chat must be, and the field to blame when it cannot be.
fn chat_grammar(
    structured: Option<StructuredOutput>,
    tools: Option<&Tools>,
) -> Result<Option<(Grammar, &'static str)>, ApiError> {
    let Some(tools) = tools else {
        return Ok(structured.map(|StructuredOutput { grammar, param }| (grammar, param)));
    };
    let Some(StructuredOutput { grammar, param }) = structured else {
        return Ok(tools.grammar(None).map(|grammar| (grammar, "tools")));
    };
    match grammar {
        // A tool that must be called leaves no other answer.
        Grammar::JsonSchema(schema) => Ok(tools.grammar(Some(schema)).map(|grammar| (grammar, param))),
        _ => Err(ApiError::invalid(
            param,
            "given beside tools",
            "a JSON schema, or tool_choice to be \"none\"",
        )),
    }
}

fn delivery(fields: &GenerationFields) -> Result<Delivery, ApiError> {
    match (fields.stream, fields.stream_options) {
        (false, Some(_)) => Err(ApiError::invalid("stream_options", "given", "stream to be true beside it")),
        (false, None) => Ok(Delivery::Whole),
        (true, options) => Ok(Delivery::Stream { options: options.unwrap_or_default() }),
    }
}
