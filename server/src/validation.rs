//! From requests as they were sent to requests that can be run: [`ValidRequest`] is made here only.
//!
//! Rendering a template and tokenizing take time that grows with the text: these functions belong on a thread
//! that may block.

use nibble_engine::{EngineHandle, Request, SamplingParameters, SubmitError, TokenConstraint};
use nibble_model::chat_template::ChatInputs;
use nibble_model::generation_config::GenerationConfig;

use crate::app::AppState;
use crate::grammar::{Grammar, Grammars};
use crate::messages::normalized;
use crate::openai::error::ApiError;
use crate::openai::types::chat::ChatRequest;
use crate::openai::types::completions::{CompletionRequest, Prompts};
use crate::openai::types::sampling::{GenerationFields, StreamOptions};
use crate::openai::types::structured::StructuredOutput;
use crate::tools::Tools;

/// Most choices of one request, over all of its prompts.
const MAXIMUM_CHOICES: usize = 1024;
/// Most log probabilities of a position, besides the sampled token's.
const MAXIMUM_LOGPROBS: u32 = 20;
/// Most stop strings, and most bytes of one: both are looked for at each token.
const MAXIMUM_STOPS: usize = 16;
const MAXIMUM_STOP_BYTES: usize = 1024;
/// Most that `logit_bias` may add or subtract, as OpenAI has it.
const MAXIMUM_BIAS: f32 = 100.0;
/// Tokens of a completion that does not say how many, as OpenAI has it.
const DEFAULT_COMPLETION_TOKENS: usize = 16;
/// Most choices of one request with a structured output: each has a parser of its own.
const MAXIMUM_STRUCTURED_CHOICES: usize = 128;

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
    choices_per_prompt: usize,
    stop: Vec<String>,
    include_stop: bool,
    skip_special_tokens: bool,
    delivery: Delivery,
    /// The field that the prompts came from.
    prompt_field: &'static str,
}

/// One prompt.
#[derive(Debug)]
pub(crate) struct Prompt {
    /// Its tokens.
    pub(crate) token_ids: Vec<u32>,
    /// What the answer shall begin with: the prompt's text for `echo`, else nothing.
    pub(crate) echo: String,
    /// Most tokens of each completion.
    max_tokens: usize,
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
        let mut fields = request.generation;
        model.check_name(fields.model.as_deref())?;
        let mut sampling = sampling(&fields, &model.generation_config)?;
        sampling.logprobs = request.logprobs.map(|count| logprobs("logprobs", count)).transpose()?;
        if request.echo && sampling.logprobs.is_some() {
            return Err(ApiError::UnsupportedField {
                param: "echo".to_owned(),
                found: "true together with logprobs".to_owned(),
            });
        }
        let max_tokens = fields.max_tokens.map_or(DEFAULT_COMPLETION_TOKENS, |tokens| tokens as usize);
        let from_text = |text: String| {
            let token_ids = model.tokenizer.encode(&text, request.add_special_tokens)?;
            let echo = if request.echo { text } else { String::new() };
            Ok::<_, ApiError>(Prompt { token_ids, echo, max_tokens })
        };
        let from_tokens = |token_ids: Vec<u32>| {
            let echo = match request.echo {
                true => model.tokenizer.decode(&token_ids, fields.skip_special_tokens)?,
                false => String::new(),
            };
            Ok::<_, ApiError>(Prompt { token_ids, echo, max_tokens })
        };
        let prompts: Result<Vec<_>, ApiError> = match request.prompt {
            Prompts::Text(text) => Ok(vec![from_text(text)?]),
            Prompts::Texts(texts) => texts.into_iter().map(from_text).collect(),
            Prompts::Tokens(tokens) => Ok(vec![from_tokens(tokens)?]),
            Prompts::TokenLists(lists) => lists.into_iter().map(from_tokens).collect(),
        };
        let structured = fields.structured.take();
        let mut request = Self::new(&model.engine, prompts?, fields, sampling, FIELD)?;
        if let Some(StructuredOutput { grammar, param }) = structured {
            request.constrain(&state.grammars, grammar, param)?;
        }
        Ok(request)
    }

    /// Checks a chat completion request, puts it into the model's form and tokenizes it.
    pub(crate) fn chat(state: &AppState, request: ChatRequest) -> Result<Self, ApiError> {
        const FIELD: &str = "messages";
        let model = &state.model;
        let mut fields = request.generation;
        model.check_name(fields.model.as_deref())?;
        let mut sampling = sampling(&fields, &model.generation_config)?;
        sampling.logprobs = match (request.logprobs, request.top_logprobs) {
            (true, count) => Some(logprobs("top_logprobs", count.unwrap_or(0))?),
            (false, None | Some(0)) => None,
            (false, Some(count)) => {
                return Err(ApiError::invalid("top_logprobs", count, "logprobs to be true beside it"));
            }
        };
        let Some(template) = &model.chat_template else {
            return Err(ApiError::NoChatTemplate { model: model.name.clone() });
        };
        let messages = request
            .messages
            .into_iter()
            .enumerate()
            .map(|(at, message)| normalized(at, message))
            .collect::<Result<Vec<_>, _>>()?;
        if messages.is_empty() {
            return Err(ApiError::invalid(FIELD, "[]", "at least one message"));
        }
        let format = state.tool_call_format;
        let tools =
            Tools::new(format, &request.tools, request.tool_choice.as_ref(), request.parallel_tool_calls)?;
        // Tags of calls may be special tokens.
        fields.skip_special_tokens &= tools.is_none();
        let grammar = chat_grammar(fields.structured.take(), tools.as_ref())?;
        let text = template.render(&ChatInputs {
            messages,
            tools: tools.is_some().then_some(request.tools),
            documents: request.documents,
            add_generation_prompt: request.add_generation_prompt,
            variables: request.chat_template_kwargs,
        })?;
        let token_ids = model.tokenizer.encode(&text, request.add_special_tokens)?;
        let maximum_tokens = model.engine.maximum_tokens();
        let max_tokens = match request.max_completion_tokens.or(fields.max_tokens) {
            Some(0) if request.max_completion_tokens.is_some() => {
                return Err(ApiError::invalid("max_completion_tokens", 0, "at least 1"));
            }
            Some(max_tokens) => max_tokens as usize,
            // What fits; one at least, so that a prompt which fills everything is refused for its length.
            None => maximum_tokens.saturating_sub(token_ids.len()).max(1),
        };
        let prompt = Prompt { token_ids, echo: String::new(), max_tokens };
        let mut request = Self::new(&model.engine, vec![prompt], fields, sampling, FIELD)?;
        if let Some((grammar, param)) = grammar {
            request.constrain(&state.grammars, grammar, param)?;
        }
        request.tools = tools;
        Ok(request)
    }

    /// Demands that completions are texts of `grammar`, which comes from the field `param`.
    fn constrain(&mut self, grammars: &Grammars, grammar: Grammar, param: &str) -> Result<(), ApiError> {
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
        let constraint = grammars.compile(grammar).map_err(|error| {
            let message = format!("{param} cannot be followed: {error}");
            ApiError::InvalidField { param: param.to_owned(), message }
        })?;
        self.constraint = Some(constraint);
        Ok(())
    }

    fn new(
        engine: &EngineHandle,
        prompts: Vec<Prompt>,
        fields: GenerationFields,
        sampling: SamplingParameters,
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
        let maximum_tokens = engine.maximum_tokens();
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
        Ok(Self {
            prompts,
            sampling,
            constraint: None,
            tools: None,
            choices_per_prompt,
            include_stop: fields.include_stop_str_in_output,
            skip_special_tokens: fields.skip_special_tokens,
            delivery: delivery(&fields)?,
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
    pub(crate) fn engine_request(&self, prompt: &Prompt, choice: usize) -> Request {
        let mut sampling = self.sampling.clone();
        sampling.seed = sampling.seed.map(|seed| seed.wrapping_add(choice as u64));
        sampling.max_tokens = prompt.max_tokens;
        Request { constraint: self.constraint.clone(), ..Request::new(prompt.token_ids.clone(), sampling) }
    }

    /// The tools that the model may call.
    pub(crate) fn tools(&self) -> Option<&Tools> {
        self.tools.as_ref()
    }

    /// Stop strings, none of them empty.
    pub(crate) fn stop(&self) -> &[String] {
        &self.stop
    }

    /// Whether the stop string belongs to the text.
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

/// The sampling parameters of both endpoints: the request's, else the model's own defaults, else none. Their
/// ranges are checked by the engine.
fn sampling(fields: &GenerationFields, of_model: &GenerationConfig) -> Result<SamplingParameters, ApiError> {
    let default = SamplingParameters::default();
    let top_k = match fields.top_k {
        None => of_model.top_k,
        Some(0 | -1) => None,
        Some(top_k) => Some(
            usize::try_from(top_k)
                .map_err(|_| ApiError::invalid("top_k", top_k, "at least 1, or 0 or -1 for all tokens"))?,
        ),
    };
    let logit_bias = fields
        .logit_bias
        .iter()
        .map(|(token, &bias)| {
            let id = token
                .parse()
                .map_err(|_| ApiError::invalid("logit_bias", format!("{token:?}"), "token ids"))?;
            if bias.abs() > MAXIMUM_BIAS {
                return Err(ApiError::invalid("logit_bias", bias, "numbers from -100 to 100"));
            }
            Ok((id, bias))
        })
        .collect::<Result<_, _>>()?;
    Ok(SamplingParameters {
        min_tokens: fields.min_tokens.map_or(default.min_tokens, |tokens| tokens as usize),
        temperature: fields.temperature.or(of_model.temperature).unwrap_or(default.temperature),
        top_p: fields.top_p.or(of_model.top_p).unwrap_or(default.top_p),
        top_k,
        min_p: fields.min_p.or(of_model.min_p).unwrap_or(default.min_p),
        repetition_penalty: fields
            .repetition_penalty
            .or(of_model.repetition_penalty)
            .unwrap_or(default.repetition_penalty),
        frequency_penalty: fields.frequency_penalty.unwrap_or(default.frequency_penalty),
        presence_penalty: fields.presence_penalty.unwrap_or(default.presence_penalty),
        logit_bias,
        seed: fields.seed.map(i64::cast_unsigned),
        stop_token_ids: fields.stop_token_ids.clone(),
        ignore_eos: fields.ignore_eos,
        ..default
    })
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

fn logprobs(field: &str, count: u32) -> Result<usize, ApiError> {
    if count > MAXIMUM_LOGPROBS {
        return Err(ApiError::invalid(field, count, format!("at most {MAXIMUM_LOGPROBS}")));
    }
    Ok(count as usize)
}

fn delivery(fields: &GenerationFields) -> Result<Delivery, ApiError> {
    match (fields.stream, fields.stream_options) {
        (false, Some(_)) => Err(ApiError::invalid("stream_options", "given", "stream to be true beside it")),
        (false, None) => Ok(Delivery::Whole),
        (true, options) => Ok(Delivery::Stream { options: options.unwrap_or_default() }),
    }
}

fn stop_strings(stops: Vec<String>) -> Result<Vec<String>, ApiError> {
    if stops.len() > MAXIMUM_STOPS {
        return Err(ApiError::invalid(
            "stop",
            format!("{} strings", stops.len()),
            format!("at most {MAXIMUM_STOPS}"),
        ));
    }
    match stops.iter().find(|stop| stop.is_empty() || stop.len() > MAXIMUM_STOP_BYTES) {
        Some(stop) => {
            let expected = format!("strings of 1 to {MAXIMUM_STOP_BYTES} bytes");
            Err(ApiError::invalid("stop", format!("a string of {} bytes", stop.len()), expected))
        }
        None => Ok(stops),
    }
}
