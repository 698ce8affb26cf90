/**
 * The library for C, and for all that can call C: `pocketlora.h` (`ios/Sources/CPocketLora`) is made of this module.
 *
 * Each function checks what it is given, hands it to the engine, and gives back a code: no work is done here. What a call
 * takes and gives:
 *
 * - Handles are opaque. Each `_free` function takes null, and a handle that was freed already, and does nothing then.
 * - Texts are UTF-8 with a length. Those that go in are read before the call returns. Those that come out live as long as
 *   the handle that they were asked of.
 * - Structs begin with their size in bytes. An app that was built with an older header works on a newer library, which
 *   takes what the app does not know as not set; a newer app's settings that this library does not know are refused.
 * - Codes: 0 is success, all others are those of `pl_code`. `error`, where it is not null, is set to null by success, and
 *   to a new error by failure, which the caller frees.
 * - Threads: every function may be called from any thread, and works on its own thread until it returns. A chat or trainer
 *   works for one call at a time; a second one is refused as busy. Engines serve any number of calls.
 * - Values out of range are refused as `PL_CODE_CONFIG`, and the message tells the range. What may be null says so.
 * - Stopping: chats and vectors by a `pl_cancel`, runs by `pl_trainer_order`, and work on files by its listener's answer.
 * - Callbacks are called on the thread of the call that they were given to, and must not throw or jump through it.
 */

#ifndef POCKETLORA_H
#define POCKETLORA_H

#include <stddef.h>
#include <stdint.h>

/**
 * Raised when an app that was built for an older library could no longer work on a newer one.
 */
#define PL_ABI_VERSION 1

/**
 * The flag of `pl_engine_options` for keys and values in 8 bits: half the memory of long texts, at a small cost.
 */
#define PL_INT8_CACHE 1

/**
 * The flag for work without a tokenizer.
 */
#define PL_IDS_ONLY 2

/**
 * The flag that refuses adapters of another base, which are warned of otherwise.
 */
#define PL_STRICT 4

/**
 * The flag of `pl_train_options` for fixed defaults in the place of settings that a short probe chooses.
 */
#define PL_FIXED_SETTINGS 1

/**
 * The flag that refuses an adapter that answers what was held out worse than before: see
 * `pl_trainer_run`.
 */
#define PL_REFUSE_WORSE 2

/**
 * Goes on.
 */
#define PL_RUN 0

/**
 * Holds the run where it is, within a layer's time.
 */
#define PL_PAUSE 1

/**
 * Ends it with a checkpoint of the last whole step, within a layer's time.
 */
#define PL_STOP 2

/**
 * Stable numbers for app code; the wrappers for other languages carry the same list.
 */
enum pl_code
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * A file could not be read or written.
   */
  PL_CODE_IO = 1,
  /**
   * A file is not what its format asks for: truncated, contradictory, out of range.
   */
  PL_CODE_FORMAT = 2,
  /**
   * A well-formed file asks for something this version does not do.
   */
  PL_CODE_UNSUPPORTED = 3,
  /**
   * An adapter does not belong to this base model.
   */
  PL_CODE_ADAPTER_MISMATCH = 4,
  /**
   * Training or evaluation data is empty, malformed or unusable.
   */
  PL_CODE_DATA = 5,
  /**
   * A setting is out of range or contradicts another.
   */
  PL_CODE_CONFIG = 6,
  /**
   * An allocation was refused.
   */
  PL_CODE_OUT_OF_MEMORY = 7,
  /**
   * A device failed or was lost.
   */
  PL_CODE_DEVICE = 8,
  /**
   * A download failed or its checksum is wrong.
   */
  PL_CODE_NETWORK = 9,
  /**
   * The caller stopped the work.
   */
  PL_CODE_CANCELLED = 10,
  /**
   * Loss or gradients became NaN or infinite.
   */
  PL_CODE_DIVERGED = 11,
  /**
   * A text has more tokens than the context takes.
   */
  PL_CODE_CONTEXT_FULL = 12,
  /**
   * A handle of the C library, or of a wrapper of it, is null, was freed, or is of another kind.
   */
  PL_CODE_HANDLE = 13,
  /**
   * A chat or trainer is at work for another caller.
   */
  PL_CODE_BUSY = 14,
  /**
   * A bug in the library, which was caught at its border.
   */
  PL_CODE_INTERNAL = 15,
  /**
   * A sealed adapter is not for this key, or is not signed by that one; a key is none.
   */
  PL_CODE_KEY = 16,
  /**
   * A sealed adapter is older than the least version that is taken.
   */
  PL_CODE_OUTDATED = 17,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum pl_code pl_code;
#else
typedef uint32_t pl_code;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Bytes that the library made.
 */
typedef struct pl_buffer pl_buffer;

/**
 * A wish to stop, which any thread may have. One may stop several calls.
 */
typedef struct pl_cancel pl_cancel;

/**
 * A conversation on a model.
 */
typedef struct pl_chat pl_chat;

/**
 * An open model, shared by its chats and trainers, which keep it open after it is freed.
 */
typedef struct pl_engine pl_engine;

/**
 * What went wrong, as C sees it.
 */
typedef struct pl_error pl_error;

/**
 * A run between two steps, or at work.
 */
typedef struct pl_trainer pl_trainer;

/**
 * Text or bytes that somebody else owns.
 */
typedef struct {
  /**
   * The first byte; may be null where there are none.
   */
  const uint8_t *data;
  /**
   * How many bytes; no zero byte ends them.
   */
  size_t len;
} pl_str;

/**
 * Who hears how far work has come. The function may be null.
 */
typedef struct {
  /**
   * `sizeof(pl_work_listener)`.
   */
  uint32_t size;
  /**
   * Leave it at 0.
   */
  uint32_t reserved;
  /**
   * Given to the function.
   */
  void *user;
  /**
   * So much of `all` is done; 0 goes on, anything else stops the work, which then leaves nothing behind.
   */
  uint32_t (*on_progress)(void *user, uint64_t done, uint64_t all);
} pl_work_listener;

/**
 * How well a model answers data.
 */
typedef struct {
  /**
   * `sizeof(pl_evaluation)`, set by the caller.
   */
  uint32_t size;
  /**
   * Leave it at 0.
   */
  uint32_t reserved;
  /**
   * Tokens that were scored.
   */
  uint64_t tokens;
  /**
   * Mean loss of a token (natural log).
   */
  double loss;
  /**
   * Its exponential.
   */
  double perplexity;
} pl_evaluation;

/**
 * How a model is opened. All zero but the size is the usual way.
 */
typedef struct {
  /**
   * `sizeof(pl_engine_options)`.
   */
  uint32_t size;
  /**
   * Threads; 0 measures at first use how many serve best.
   */
  uint32_t threads;
  /**
   * Arithmetic: 0 fast (products in 8 bits), 1 bfloat16, 2 exact (f32).
   */
  uint32_t precision;
  /**
   * `PL_INT8_CACHE`, `PL_IDS_ONLY`, `PL_STRICT`, or'ed.
   */
  uint32_t flags;
  /**
   * Most tokens of one text; 0 is what the model was made for. A chat's memory grows up to it.
   */
  uint64_t context;
  /**
   * Most anonymous bytes that the model with one full chat may take; more is refused before it is opened. 0 allows all.
   */
  uint64_t memory_budget;
  /**
   * A folder for copies that make things faster and can be made again; empty for none.
   */
  pl_str cache_dir;
  /**
   * What adapters name the model by; empty for its folder.
   */
  pl_str base_name;
} pl_engine_options;

/**
 * Bytes that a model will take. Mapped ones are clean pages, which the system may drop; anonymous ones count against the
 * app.
 */
typedef struct {
  /**
   * `sizeof(pl_estimate)`, set by the caller.
   */
  uint32_t size;
  /**
   * Leave it at 0.
   */
  uint32_t reserved;
  /**
   * Parameters of the model.
   */
  uint64_t parameters;
  /**
   * Tokens of the longest text.
   */
  uint64_t context_tokens;
  /**
   * Mapped.
   */
  uint64_t mapped;
  /**
   * Anonymous, of the open model.
   */
  uint64_t opened;
  /**
   * Anonymous, of each 1,000 tokens of a chat.
   */
  uint64_t per_1000_tokens;
  /**
   * Anonymous, of a chat that fills the context.
   */
  uint64_t full_chat;
  /**
   * Anonymous, of training beside the open model; 0 without settings.
   */
  uint64_t training;
} pl_estimate;

/**
 * A file of a model that the app has open, such as an Android asset or a resource of a bundle.
 */
typedef struct {
  /**
   * Its name in the model's folder, such as `config.json`.
   */
  pl_str name;
  /**
   * The descriptor of what its bytes lie in; it stays the caller's, and may be closed when the call has returned.
   */
  int32_t descriptor;
  /**
   * Leave it at 0.
   */
  uint32_t reserved;
  /**
   * The first of its bytes.
   */
  uint64_t offset;
  /**
   * How many there are.
   */
  uint64_t length;
} pl_file;

/**
 * What a model is, and what is in use now.
 */
typedef struct {
  /**
   * `sizeof(pl_engine_info)`, set by the caller.
   */
  uint32_t size;
  /**
   * Whether it has a chat template.
   */
  uint32_t chats;
  /**
   * Tokens of the longest text.
   */
  uint64_t context_tokens;
  /**
   * Tokens that there are.
   */
  uint64_t vocabulary;
  /**
   * Numbers of a text's vector, see `pl_embed`.
   */
  uint64_t width;
  /**
   * Bytes of weights that are mapped from files.
   */
  uint64_t mapped;
  /**
   * Anonymous bytes of the whole process now; 0 where the system does not tell.
   */
  uint64_t anonymous;
  /**
   * The highest such number at the ends of answers.
   */
  uint64_t peak_anonymous;
  /**
   * Anonymous bytes of each 1,000 tokens of a chat.
   */
  uint64_t per_1000_tokens;
} pl_engine_info;

/**
 * How answers are made.
 */
typedef struct {
  /**
   * `sizeof(pl_chat_options)`.
   */
  uint32_t size;
  /**
   * Whether a model that can think before it answers is to: 0 its template decides, 1 yes, 2 no.
   */
  uint32_t thinking;
  /**
   * Most tokens of an answer.
   */
  uint64_t max_tokens;
  /**
   * Seed of the random choices; it grows by one with each answer.
   */
  uint64_t seed;
  /**
   * Keeps the likeliest tokens; 0 keeps all.
   */
  uint64_t top_k;
  /**
   * Divides the logits; 0 takes the likeliest token.
   */
  float temperature;
  /**
   * Keeps the likeliest tokens that together reach this probability; 1 keeps all.
   */
  float top_p;
  /**
   * Keeps tokens at least this fraction as likely as the likeliest; 0 keeps all.
   */
  float min_p;
  /**
   * Makes what was said before less likely; 1 does nothing.
   */
  float repetition_penalty;
  /**
   * Strength of the guard against loops (DRY); 0 is off.
   */
  float dry_multiplier;
  /**
   * What each further token of a repetition multiplies the guard's effect by.
   */
  float dry_base;
  /**
   * Tokens of a repetition that are let pass.
   */
  uint32_t dry_allowed_length;
  /**
   * Tokens of an answer after which the guard begins.
   */
  uint32_t dry_after;
} pl_chat_options;

/**
 * Who hears of an answer as it comes. Each function may be null.
 */
typedef struct {
  /**
   * `sizeof(pl_chat_listener)`.
   */
  uint32_t size;
  /**
   * Leave it at 0.
   */
  uint32_t reserved;
  /**
   * Given to each function.
   */
  void *user;
  /**
   * A piece of the answer, of whole characters, or (`thought` 1) of what the model thinks before. 0 goes on, anything
   * else ends the answer there.
   */
  uint32_t (*on_text)(void *user, pl_str piece, uint32_t thought);
  /**
   * So many tokens of the prompt are read.
   */
  void (*on_prompt)(void *user, uint64_t done, uint64_t tokens);
} pl_chat_listener;

/**
 * What an answer took.
 */
typedef struct {
  /**
   * `sizeof(pl_answer)`, set by the caller.
   */
  uint32_t size;
  /**
   * Why it ended: 0 it was done, 1 the most tokens were said, 2 the context is full, 3 it was stopped.
   */
  uint32_t finish;
  /**
   * Tokens of the prompt.
   */
  uint64_t prompt_tokens;
  /**
   * Of these, how many were not known from earlier turns.
   */
  uint64_t read_tokens;
  /**
   * Tokens of the answer.
   */
  uint64_t tokens;
  /**
   * Seconds until the first token.
   */
  double prompt_seconds;
  /**
   * Seconds for the others.
   */
  double answer_seconds;
} pl_answer;

/**
 * What a run learns, and how. All zero but the size, `data` or `lines`, and `out` is the usual way.
 */
typedef struct {
  /**
   * `sizeof(pl_train_options)`.
   */
  uint32_t size;
  /**
   * What becomes of an earlier run in `out`: 0 it stays, and the new one is refused; 1 its adapter and checkpoint give way to
   * the new run's, when there are some; 2 it goes on from its checkpoint (without one a new run begins, and a finished one is
   * refused). Files that no run wrote are never touched; a model's folder is refused.
   */
  uint32_t start;
  /**
   * `PL_FIXED_SETTINGS`, `PL_REFUSE_WORSE`, or'ed.
   */
  uint32_t flags;
  /**
   * Leave it at 0.
   */
  uint32_t reserved;
  /**
   * A file or folder of data; not together with `lines`.
   */
  pl_str data;
  /**
   * Data itself, an object of JSON a line; it is kept in `out`. With neither, a run that goes on has the lines that it
   * began with.
   */
  pl_str lines;
  /**
   * The folder for checkpoints and the adapter.
   */
  pl_str out;
  /**
   * Settings that are given: keys of `train.toml` (`pocketlora train --help` lists them), as TOML or as one object of JSON.
   */
  pl_str settings;
  /**
   * The folder of an adapter to train on; empty for a new one.
   */
  pl_str init;
  /**
   * Seconds that choosing settings and training may take; 0 for as long as it gets better.
   */
  double seconds;
} pl_train_options;

/**
 * Something that a run tells. What an event does not have is 0, or NaN.
 */
typedef struct {
  /**
   * `sizeof(pl_train_event)`; a newer library's may be larger.
   */
  uint32_t size;
  /**
   * 1 a step was done, 2 the adapter's beginning is computed, 3 general prompts are answered on which the model will be
   * held, 4 the adapter is checked, 5 something is wrong that training outlives (`message`).
   */
  uint32_t kind;
  /**
   * Number of the step, from 1.
   */
  uint64_t step;
  /**
   * Steps in all.
   */
  uint64_t steps;
  /**
   * Of 2 to 4: how many of `all` are done.
   */
  uint64_t done;
  /**
   * Of 2 to 4: layers, texts, prompts or samples in all.
   */
  uint64_t all;
  /**
   * Mean loss of the learned tokens (natural log), before the step.
   */
  double loss;
  /**
   * Mean loss on what is held out, where this step ended with that.
   */
  double held_out_loss;
  /**
   * Tokens a second.
   */
  double token_rate;
  /**
   * Learning rate.
   */
  double learning_rate;
  /**
   * For people; it lives until the call returns.
   */
  pl_str message;
} pl_train_event;

/**
 * Who watches a run. Each function may be null.
 */
typedef struct {
  /**
   * `sizeof(pl_train_listener)`.
   */
  uint32_t size;
  /**
   * Leave it at 0.
   */
  uint32_t reserved;
  /**
   * Given to each function.
   */
  void *user;
  /**
   * Hears of each event. `PL_RUN` goes on. `PL_PAUSE` is as an order to pause: it holds the run until `pl_trainer_order` says
   * `PL_RUN`, and does nothing in `pl_trainer_new`, where there is no run yet. `PL_STOP` ends the run with a checkpoint, and
   * `pl_trainer_new` with `PL_CODE_CANCELLED`.
   */
  uint32_t (*on_event)(void *user, const pl_train_event *event);
  /**
   * Asked many times a second, between layers, what the run is to do now: whether the device charges, is cool, is idle. Of it
   * and the last order the stricter one counts.
   */
  uint32_t (*policy)(void *user);
} pl_train_listener;

/**
 * What a run is.
 */
typedef struct {
  /**
   * `sizeof(pl_trainer_info)`, set by the caller.
   */
  uint32_t size;
  /**
   * Whether it goes on from a checkpoint.
   */
  uint32_t resumed;
  /**
   * Steps done.
   */
  uint64_t step;
  /**
   * Steps in all.
   */
  uint64_t steps;
  /**
   * Numbers that are trained.
   */
  uint64_t parameters;
  /**
   * Anonymous bytes that the run takes: planned, and kept to.
   */
  uint64_t planned;
} pl_trainer_info;

/**
 * What a run did. What was not measured is NaN, or -1.
 */
typedef struct {
  /**
   * `sizeof(pl_train_summary)`, set by the caller.
   */
  uint32_t size;
  /**
   * 1 where the run came to its end and the adapter is written; 0 where it was stopped with a checkpoint.
   */
  uint32_t done;
  /**
   * Steps done, those before a resume included.
   */
  uint64_t steps;
  /**
   * Tokens learned in this process.
   */
  uint64_t trained_tokens;
  /**
   * Seconds in this process.
   */
  double seconds;
  /**
   * Loss of the last step.
   */
  double loss;
  /**
   * Loss on what is held out, before the run.
   */
  double held_out_before;
  /**
   * The same of the adapter that is written.
   */
  double held_out_after;
  /**
   * General questions asked.
   */
  int64_t asked;
  /**
   * Of these, answered rightly before the run.
   */
  int64_t known_before;
  /**
   * And with the adapter that is written.
   */
  int64_t known_after;
  /**
   * Highest anonymous bytes of the process seen; 0 where the system does not tell.
   */
  uint64_t peak_anonymous;
  /**
   * 1 where what is held out is answered worse than before.
   */
  uint32_t is_worse;
  /**
   * 1 where it ended because its time was over.
   */
  uint32_t out_of_time;
} pl_train_summary;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of the interface: raised when older apps would no longer work. An app compares it with `PL_ABI_VERSION`.
 */
uint32_t pl_abi_version(void);

/**
 * The library's version, such as `0.1.0`; it lives forever.
 */
pl_str pl_version(void);

/**
 * The code of an error, as the failed call returned it; 0 for what is no error.
 */
uint32_t pl_error_code(const pl_error *error);

/**
 * What an error says for people: place, what was expected and found, and what to do. It lives until the error is freed.
 */
pl_str pl_error_message(const pl_error *error);

/**
 * The file, tensor, line or setting that failed. It lives until the error is freed.
 */
pl_str pl_error_item(const pl_error *error);

/**
 * What to do about it, empty where nothing can be done. It lives until the error is freed.
 */
pl_str pl_error_next(const pl_error *error);

/**
 * Frees an error.
 */
void pl_error_free(pl_error *error);

/**
 * The bytes of a buffer; text is UTF-8. They live until it is freed. None of what is no buffer, as with the parts of errors.
 */
pl_str pl_buffer_bytes(const pl_buffer *buffer);

/**
 * Frees a buffer.
 */
void pl_buffer_free(pl_buffer *buffer);

/**
 * Makes a wish to stop that nobody has yet.
 */
uint32_t pl_cancel_new(pl_cancel **cancel, pl_error **error);

/**
 * Stops (`wish` 1) the calls that it was given to, those at work within a layer's time and later ones at once; 0 takes the
 * wish back. May be called from any thread.
 */
uint32_t pl_cancel_set(const pl_cancel *cancel,
                       uint32_t wish,
                       pl_error **error);

/**
 * Frees it; calls that it was given to go on.
 */
void pl_cancel_free(pl_cancel *cancel);

/**
 * Makes of the model `source`, a GGUF file or a folder in 16 bits, a folder `out` with the weights in NF4, as
 * `pl_engine_open` takes it. What lies at `out` is not replaced; an unfinished one never has that name, and what a kill leaves
 * beside it under a hidden name goes with the next import to that place. `listener` may be null.
 */
uint32_t pl_model_import(pl_str source,
                         pl_str out,
                         const pl_work_listener *listener,
                         pl_error **error);

/**
 * Writes the folder `out`: the model `model` with the effect of the adapter `adapter`, multiplied by `scale`, in its weights.
 * `to` is their type: 0 NF4, 1 float16, 2 bfloat16, 3 float32. `listener` may be null.
 */
uint32_t pl_merge(pl_str model,
                  pl_str adapter,
                  float scale,
                  uint32_t to,
                  pl_str out,
                  const pl_work_listener *listener,
                  pl_error **error);

/**
 * Scores the answers in `data`, a file or folder as training takes it, by the model with its attached adapters. `listener`
 * (or null) hears of tokens.
 */
uint32_t pl_evaluate(const pl_engine *engine,
                     pl_str data,
                     const pl_work_listener *listener,
                     pl_evaluation *evaluation,
                     pl_error **error);

/**
 * Tells what the model in the folder `model` will take with `options`, and a run of training with the settings `training`
 * (as those of `pl_train_options`; null for no training). No weights are read.
 */
uint32_t pl_model_estimate(pl_str model,
                           const pl_engine_options *options,
                           const pl_str *training,
                           pl_estimate *estimate,
                           pl_error **error);

/**
 * Opens the model in the folder `model`: its weights are mapped. `options` may be null for the usual way. A GGUF file, or a model in 16 bits, is made into such a
 * folder by `pl_model_import`.
 */
uint32_t pl_engine_open(pl_str model,
                        const pl_engine_options *options,
                        pl_engine **engine,
                        pl_error **error);

/**
 * As `pl_engine_open`, for a model in `count` files that are open already. Weights (`.safetensors`) are mapped where they
 * lie; the other files, some megabytes, are copied into a folder in `scratch` that goes when the model is closed.
 */
uint32_t pl_engine_open_files(const pl_file *files,
                              size_t count,
                              pl_str scratch,
                              const pl_engine_options *options,
                              pl_engine **engine,
                              pl_error **error);

/**
 * Closes a model, once its chats and trainers are freed, too.
 */
void pl_engine_free(pl_engine *engine);

/**
 * Tells what an open model is, and what it takes.
 */
uint32_t pl_engine_info_of(const pl_engine *engine, pl_engine_info *info, pl_error **error);

/**
 * Makes a vector of length 1 of a text: the states of its tokens after the last layer, their mean (`last` 0) or the last
 * one's (1). `vector` has room for `capacity` floats, the model's width (`pl_engine_info_of`). `cancel` may be null; a
 * call that it stops fails with `PL_CODE_CANCELLED`.
 */
uint32_t pl_embed(const pl_engine *engine,
                  pl_str text,
                  uint32_t last,
                  float *vector,
                  size_t capacity,
                  const pl_cancel *cancel,
                  pl_error **error);

/**
 * Adds the PEFT adapter in the folder `adapter`, its effect multiplied by `scale` (1 for as it was trained). Chats that did
 * not choose adapters use it from their next answer on. `number` becomes what it is called by.
 */
uint32_t pl_adapter_attach(const pl_engine *engine,
                           pl_str adapter,
                           float scale,
                           uint64_t *number,
                           pl_error **error);

/**
 * As `pl_adapter_attach`, for an adapter that the app holds in memory: the bytes of its `adapter_config.json` and of its
 * `adapter_model.safetensors`, which are copied. Messages and lists call it `name`.
 */
uint32_t pl_adapter_attach_bytes(const pl_engine *engine,
                                 pl_str config,
                                 pl_str tensors,
                                 pl_str name,
                                 float scale,
                                 uint64_t *number,
                                 pl_error **error);

/**
 * Multiplies the effects of `count` attached adapters by `scales`, all at once, well within a millisecond.
 */
uint32_t pl_adapters_scale(const pl_engine *engine,
                           const uint64_t *numbers,
                           const float *scales,
                           size_t count,
                           pl_error **error);

/**
 * Removes an adapter. Answers that are being given use it to their end.
 */
uint32_t pl_adapter_detach(const pl_engine *engine, uint64_t number, pl_error **error);

/**
 * Tells which adapters are attached: a list in JSON of objects with `number`, `folder`, `scale` and `warnings`.
 */
uint32_t pl_adapters_list(const pl_engine *engine,
                          pl_buffer **json,
                          pl_error **error);

/**
 * Seals the adapter in the folder `adapter` for this model: `sealed` becomes the bytes of a file that only `key` opens, 32
 * bytes from the system's keystore. `version` counts up, so that an app can refuse what is older than what it had. `signer`
 * is empty, or the 32 bytes of a secret Ed25519 key.
 */
uint32_t pl_adapter_seal(const pl_engine *engine,
                         pl_str adapter,
                         pl_str key,
                         uint64_t version,
                         pl_str signer,
                         pl_buffer **sealed,
                         pl_error **error);

/**
 * As `pl_adapter_attach`, for a sealed adapter, which is opened into memory alone. A changed byte, another key, another
 * model, a version below `least_version`, and a signature that is not of the public key `signer` (empty takes any) are
 * refused, each by its code. Messages and lists call it `name`.
 */
uint32_t pl_adapter_attach_sealed(const pl_engine *engine,
                                  pl_str sealed,
                                  pl_str name,
                                  pl_str key,
                                  uint64_t least_version,
                                  pl_str signer,
                                  float scale,
                                  uint64_t *number,
                                  pl_error **error);

/**
 * Begins a conversation, with the sampling that the model's makers recommend and all attached adapters.
 */
uint32_t pl_chat_new(const pl_engine *engine, pl_chat **chat, pl_error **error);

/**
 * Ends a conversation; an answer that is being given goes on to its end.
 */
void pl_chat_free(pl_chat *chat);

/**
 * Tells how a chat's answers are made now: what an app changes and hands to `pl_chat_set_options`.
 */
uint32_t pl_chat_options_of(const pl_chat *chat, pl_chat_options *options, pl_error **error);

/**
 * Sets how a chat's answers are made, from `pl_chat_options_of` with some changed.
 */
uint32_t pl_chat_set_options(const pl_chat *chat, const pl_chat_options *options, pl_error **error);

/**
 * Sets the texts at which answers stop.
 */
uint32_t pl_chat_set_stops(const pl_chat *chat, const pl_str *texts, size_t count, pl_error **error);

/**
 * Sets the tools that the model may call: a list in JSON, as its template takes them; empty for none.
 */
uint32_t pl_chat_set_tools(const pl_chat *chat, pl_str json, pl_error **error);

/**
 * Chooses the adapters of a chat, in their order, of those that are attached: none with a `count` of 0, and all that are
 * attached, now and later, where `numbers` is null.
 */
uint32_t pl_chat_use_adapters(const pl_chat *chat,
                              const uint64_t *numbers,
                              size_t count,
                              pl_error **error);

/**
 * Tells what was said: a list in JSON of objects with `role` and `content`.
 */
uint32_t pl_chat_messages(const pl_chat *chat, pl_buffer **json, pl_error **error);

/**
 * Puts another conversation in the place of a chat's: a system prompt, or one from an earlier day. What both have in common
 * is not read again.
 */
uint32_t pl_chat_set_messages(const pl_chat *chat,
                              pl_str json,
                              pl_error **error);

/**
 * Says `question` and gives the answer, both kept: piece by piece to `listener`, and whole to `text`, a new buffer. Any of
 * `listener`, `cancel`, `answer` and `text` may be null. A cancelled answer is no error: its `finish` is 3, and
 * what was said until then is kept; of one that was stopped before its first word nothing is, the question neither.
 */
uint32_t pl_chat_send(const pl_chat *chat,
                      pl_str question,
                      const pl_chat_listener *listener,
                      const pl_cancel *cancel,
                      pl_answer *answer,
                      pl_buffer **text,
                      pl_error **error);

/**
 * As `pl_chat_send`, for a turn that is made already: one message in JSON, such as what a tool gave.
 */
uint32_t pl_chat_say(const pl_chat *chat,
                     pl_str message,
                     const pl_chat_listener *listener,
                     const pl_cancel *cancel,
                     pl_answer *answer,
                     pl_buffer **text,
                     pl_error **error);

/**
 * As `pl_chat_send`, for a text that is continued as it is and kept in no conversation.
 */
uint32_t pl_chat_complete(const pl_chat *chat,
                          pl_str beginning,
                          const pl_chat_listener *listener,
                          const pl_cancel *cancel,
                          pl_answer *answer,
                          pl_buffer **text,
                          pl_error **error);

/**
 * Keeps a conversation, and what the model remembers of it, as bytes: an app may be ended, and the chat goes on as if it
 * had not been.
 */
uint32_t pl_chat_save(const pl_chat *chat,
                      pl_buffer **state,
                      pl_error **error);

/**
 * Goes on with a conversation that was kept with this model and the adapters that are in use. Nothing changes on failure.
 */
uint32_t pl_chat_restore(const pl_chat *chat,
                         pl_str state,
                         pl_error **error);

/**
 * Prepares a run on an open model: reads the data, and chooses the settings that are not given by a short probe, of which
 * `listener` (or null) hears. The adapter is written when the run ends; chats of the model go on meanwhile.
 */
uint32_t pl_trainer_new(const pl_engine *engine,
                        const pl_train_options *options,
                        const pl_train_listener *listener,
                        pl_trainer **trainer,
                        pl_error **error);

/**
 * Frees a run. One that is at work or held is stopped first, with a checkpoint, and `pl_trainer_run` returns; steps that were
 * done one by one and not saved are lost.
 */
void pl_trainer_free(pl_trainer *trainer);

/**
 * Tells what a run is, between two steps.
 */
uint32_t pl_trainer_info_of(const pl_trainer *trainer, pl_trainer_info *info, pl_error **error);

/**
 * Runs to the end, or until the listener, its policy or `pl_trainer_order` stops it; then writes the adapter, or a
 * checkpoint. It takes the time that training takes: call it on a thread of its own. `listener` and `summary` may be null.
 *
 * With `PL_REFUSE_WORSE`, a run whose adapter answers what is held out worse than the model did before fails with
 * `PL_CODE_DIVERGED`: the adapter is in its folder, and is not to be used.
 */
uint32_t pl_trainer_run(const pl_trainer *trainer,
                        const pl_train_listener *listener,
                        pl_train_summary *summary,
                        pl_error **error);

/**
 * Does one step, for apps that train in slices of their own; `event` (or null) becomes what it did. After the last step
 * `pl_trainer_run` writes the adapter.
 */
uint32_t pl_trainer_step(const pl_trainer *trainer,
                         pl_train_event *event,
                         pl_error **error);

/**
 * Orders a run from any thread, also while it is at work: `PL_PAUSE` holds it within a layer's time, `PL_RUN` lets it go on,
 * `PL_STOP` ends `pl_trainer_run` with a checkpoint. An order holds until the next one.
 */
uint32_t pl_trainer_order(const pl_trainer *trainer,
                          uint32_t order,
                          pl_error **error);

/**
 * Waits until a run is held, at most so many seconds; `paused` becomes 1 if it is, and 0 if not, also where the run has not
 * begun or has ended.
 */
uint32_t pl_trainer_wait_paused(const pl_trainer *trainer,
                                double seconds,
                                uint32_t *paused,
                                pl_error **error);

/**
 * Writes a checkpoint between two steps, from which the run can go on in another process.
 */
uint32_t pl_trainer_save(const pl_trainer *trainer, pl_error **error);

/**
 * Attaches the adapter as it is after the last whole step, also while the run is at work or held: what was learned so far
 * can be tried. `number` becomes what it is called by.
 */
uint32_t pl_trainer_attach(const pl_trainer *trainer,
                           float scale,
                           uint64_t *number,
                           pl_error **error);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* POCKETLORA_H */
