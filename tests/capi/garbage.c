/* Calls every function with handles that are null, none at all, of another kind, and freed: each is refused by name. */
#include "pocketlora.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pl_str text(const char *chars) { return (pl_str){(const uint8_t *)chars, strlen(chars)}; }
static int failures = 0;

static void expect(const char *what, uint32_t code, uint32_t wanted, pl_error **error) {
    int told = *error != NULL && pl_error_code(*error) == code && pl_error_message(*error).len > 0;
    if (code != wanted || (code != 0) != told) {
        fprintf(stderr, "%s: got %u, wanted %u: %.*s\n", what, code, wanted, (int)pl_error_message(*error).len,
                pl_error_message(*error).data);
        failures++;
    }
    pl_error_free(*error);
    pl_error_free(*error); /* Twice does nothing. */
    *error = NULL;
}
#define REFUSED(call) expect(#call, call, PL_CODE_HANDLE, &e)
#define CONFIG(call) expect(#call, call, PL_CODE_CONFIG, &e)
#define OK(call) expect(#call, call, 0, &e)

/* Every function that takes a handle, with one that is none of its kind. */
static void handles(void *bad) {
    pl_error *e = NULL;
    uint64_t number = 0;
    uint32_t paused = 0;
    float scale = 1, vector[4096];
    pl_buffer *buffer = NULL;
    pl_chat *chat = NULL;
    pl_trainer *trainer = NULL;
    pl_engine_info info = {.size = sizeof info};
    pl_chat_options options = {.size = sizeof options};
    pl_train_options lesson = {.size = sizeof lesson, .data = text("d"), .out = text("o")};
    pl_trainer_info run = {.size = sizeof run};
    pl_train_event event = {.size = sizeof event};
    pl_evaluation evaluation = {.size = sizeof evaluation};
    REFUSED(pl_engine_info_of(bad, &info, &e));
    REFUSED(pl_embed(bad, text("x"), 0, vector, 4096, NULL, &e));
    REFUSED(pl_evaluate(bad, text("x"), NULL, &evaluation, &e));
    REFUSED(pl_adapter_attach(bad, text("x"), 1, &number, &e));
    REFUSED(pl_adapter_attach_bytes(bad, text("{}"), text("x"), text("x"), 1, &number, &e));
    REFUSED(pl_adapter_seal(bad, text("x"), text("k"), 1, text(""), &buffer, &e));
    REFUSED(pl_adapter_attach_sealed(bad, text("x"), text("x"), text("k"), 1, text(""), 1, &number, &e));
    REFUSED(pl_adapters_scale(bad, &number, &scale, 1, &e));
    REFUSED(pl_adapter_detach(bad, 1, &e));
    REFUSED(pl_adapters_list(bad, &buffer, &e));
    REFUSED(pl_chat_new(bad, &chat, &e));
    REFUSED(pl_chat_options_of(bad, &options, &e));
    REFUSED(pl_chat_set_options(bad, &options, &e));
    REFUSED(pl_chat_set_stops(bad, NULL, 0, &e));
    REFUSED(pl_chat_set_tools(bad, text(""), &e));
    REFUSED(pl_chat_use_adapters(bad, NULL, 0, &e));
    REFUSED(pl_chat_messages(bad, &buffer, &e));
    REFUSED(pl_chat_set_messages(bad, text("[]"), &e));
    REFUSED(pl_chat_send(bad, text("x"), NULL, NULL, NULL, NULL, &e));
    REFUSED(pl_chat_say(bad, text("{}"), NULL, NULL, NULL, NULL, &e));
    REFUSED(pl_chat_complete(bad, text("x"), NULL, NULL, NULL, NULL, &e));
    REFUSED(pl_chat_save(bad, &buffer, &e));
    REFUSED(pl_chat_restore(bad, text("x"), &e));
    REFUSED(pl_trainer_new(bad, &lesson, NULL, &trainer, &e));
    REFUSED(pl_trainer_info_of(bad, &run, &e));
    REFUSED(pl_trainer_run(bad, NULL, NULL, &e));
    REFUSED(pl_trainer_step(bad, &event, &e));
    REFUSED(pl_trainer_order(bad, PL_STOP, &e));
    REFUSED(pl_trainer_wait_paused(bad, 0, &paused, &e));
    REFUSED(pl_trainer_save(bad, &e));
    REFUSED(pl_trainer_attach(bad, 1, &number, &e));
    REFUSED(pl_cancel_set(bad, 1, &e));
    pl_engine_free(bad), pl_chat_free(bad), pl_trainer_free(bad), pl_cancel_free(bad), pl_buffer_free(bad), pl_error_free(bad);
    if (pl_error_code(bad) || pl_error_message(bad).len || pl_error_item(bad).len || pl_error_next(bad).len ||
        pl_buffer_bytes(bad).len)
        failures++, fprintf(stderr, "a handle of nothing says something\n");
    if (buffer || chat || trainer || number || paused) failures++, fprintf(stderr, "a refused call gave something\n");
}

/* A chat at work, asked by its own callback and by another thread. */
static pl_chat *busy;
static void *ask_from_another_thread(void *user) {
    pl_error *e = NULL;
    (void)user;
    expect("another thread", pl_chat_send(busy, text("x"), NULL, NULL, NULL, NULL, &e), PL_CODE_BUSY, &e);
    return NULL;
}
static uint32_t ask_from_within(void *user, pl_str piece, uint32_t thought) {
    pl_error *e = NULL;
    pthread_t thread;
    (void)piece, (void)thought;
    if ((*(int *)user)++) return 1;
    expect("its own callback", pl_chat_send(busy, text("x"), NULL, NULL, NULL, NULL, &e), PL_CODE_BUSY, &e);
    if (!pthread_create(&thread, NULL, ask_from_another_thread, NULL)) pthread_join(thread, NULL);
    pl_chat_free(busy); /* While it is at work: it goes on to its end. */
    return 0;
}

/* A run on a thread of its own, which is freed while it is held. */
static void *run_until_freed(void *trainer) {
    pl_error *e = NULL;
    pl_train_summary summary = {.size = sizeof summary, .done = 1};
    OK(pl_trainer_run(trainer, NULL, &summary, &e));
    if (summary.done) failures++, fprintf(stderr, "a freed run says that it is done\n");
    return NULL;
}

static void free_what_is_held(pl_engine *engine, const char *out) {
    pl_error *e = NULL;
    pl_trainer *trainer = NULL;
    uint32_t paused = 0;
    pthread_t thread;
    pl_train_options lesson = {
        .size = sizeof lesson,
        .start = 1,
        .flags = PL_FIXED_SETTINGS,
        .lines = text("{\"prompt\": \"a\", \"completion\": \"b\"}\n"),
        .out = text(out),
        .settings = text("{\"steps\": 5, \"keep\": \"off\", \"check\": false}"),
    };
    OK(pl_trainer_new(engine, &lesson, NULL, &trainer, &e));
    OK(pl_trainer_order(trainer, PL_PAUSE, &e));
    if (pthread_create(&thread, NULL, run_until_freed, trainer)) exit(3);
    OK(pl_trainer_wait_paused(trainer, 60, &paused, &e));
    if (!paused) failures++, fprintf(stderr, "a run is not held\n");
    pl_trainer_free(trainer);
    pthread_join(thread, NULL);
    REFUSED(pl_trainer_order(trainer, PL_RUN, &e));
}

/* The model in the folder `model` by its open files. */
static void open_by_files(const char *model, const char *scratch) {
    static const char *const names[] = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"};
    pl_error *e = NULL;
    pl_engine *engine = NULL;
    pl_chat *chat = NULL;
    pl_file files[4] = {0};
    FILE *open[4] = {0};
    for (int i = 0; i < 4; i++) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%s", model, names[i]);
        if (!(open[i] = fopen(path, "rb")) || fseek(open[i], 0, SEEK_END)) exit(3);
        files[i] = (pl_file){.name = text(names[i]), .descriptor = fileno(open[i]), .length = (uint64_t)ftell(open[i])};
    }
    OK(pl_engine_open_files(files, 4, text(scratch), NULL, &engine, &e));
    for (int i = 0; i < 4; i++) fclose(open[i]);
    OK(pl_chat_new(engine, &chat, &e));
    OK(pl_chat_send(chat, text("x"), NULL, NULL, NULL, NULL, &e));
    pl_chat_free(chat);
    pl_engine_free(engine);
    pl_engine_options little = {.size = sizeof little, .memory_budget = 1};
    for (int i = 0; i < 4; i++) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%s", model, names[i]);
        if (!(open[i] = fopen(path, "rb"))) exit(3);
        files[i].descriptor = fileno(open[i]);
    }
    expect("a budget of a byte", pl_engine_open_files(files, 4, text(scratch), &little, &engine, &e), PL_CODE_OUT_OF_MEMORY, &e);
    for (int i = 0; i < 4; i++) fclose(open[i]);
    files[3] = files[0]; /* A name twice. */
    CONFIG(pl_engine_open_files(&files[2], 0, text(""), NULL, &engine, &e));
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    open_by_files(argv[1], argv[2]);
    pl_error *e = NULL;
    pl_engine *engine = NULL;
    pl_chat *chat = NULL;
    pl_cancel *cancel = NULL;
    pl_engine_options wrong = {.size = sizeof wrong, .precision = 9};
    int local = 0;

    handles(NULL);
    handles(&local);
    handles((void *)1);
    handles((void *)(uintptr_t)-1);

    CONFIG(pl_engine_open(text(argv[1]), NULL, NULL, &e));
    CONFIG(pl_engine_open((pl_str){NULL, 5}, NULL, &engine, &e));
    CONFIG(pl_engine_open((pl_str){NULL, 0}, NULL, &engine, &e));
    CONFIG(pl_engine_open((pl_str){(const uint8_t *)"\xff\xfe", 2}, NULL, &engine, &e));
    CONFIG(pl_engine_open(text(argv[1]), &wrong, &engine, &e));
    wrong.precision = 0, wrong.flags = 1u << 31;
    CONFIG(pl_engine_open(text(argv[1]), &wrong, &engine, &e));
    wrong.flags = 0, wrong.size = 0;
    CONFIG(pl_engine_open(text(argv[1]), &wrong, &engine, &e));
    wrong.size = sizeof wrong, wrong.memory_budget = 1;
    expect("a budget of a byte", pl_engine_open(text(argv[1]), &wrong, &engine, &e), PL_CODE_OUT_OF_MEMORY, &e);
    wrong.memory_budget = 0;
    pl_file file = {.name = text("config.json"), .descriptor = -1, .length = 1};
    CONFIG(pl_engine_open_files(NULL, 1, text(argv[2]), NULL, &engine, &e));
    CONFIG(pl_engine_open_files(&file, 1, text(argv[2]), NULL, &engine, &e));
    file.descriptor = 9999;
    expect("no descriptor", pl_engine_open_files(&file, 1, text(argv[2]), NULL, &engine, &e), PL_CODE_IO, &e);
    file.descriptor = 0, file.name = text("../config.json");
    CONFIG(pl_engine_open_files(&file, 1, text(argv[2]), NULL, &engine, &e));
    file.name = text("model.safetensors"), file.offset = UINT64_MAX;
    expect("no such bytes", pl_engine_open_files(&file, 1, text(argv[2]), NULL, &engine, &e), PL_CODE_FORMAT, &e);
    /* A newer app: what this library does not know must be 0. */
    struct {
        pl_engine_options known;
        uint64_t unknown;
    } newer = {.known = {.size = sizeof newer}};
    OK(pl_engine_open(text(argv[1]), &newer.known, &engine, &e));
    pl_engine_free(engine), engine = NULL;
    newer.unknown = 1;
    expect("a newer app", pl_engine_open(text(argv[1]), &newer.known, &engine, &e), PL_CODE_UNSUPPORTED, &e);
    /* An older app, which ends after the size. */
    uint32_t older = sizeof older;
    OK(pl_engine_open(text(argv[1]), (pl_engine_options *)&older, &engine, &e));
    pl_engine_info *small = calloc(1, 8);
    small->size = 8;
    OK(pl_engine_info_of(engine, small, &e)); /* The sanitizer sees a write beyond. */
    free(small);

    handles(engine == NULL ? NULL : (void *)((char *)engine + 1));
    OK(pl_chat_new(engine, &chat, &e));
    OK(pl_cancel_new(&cancel, &e));
    /* A handle of another kind. */
    REFUSED(pl_chat_send((pl_chat *)engine, text("x"), NULL, NULL, NULL, NULL, &e));
    REFUSED(pl_chat_new((pl_engine *)chat, &busy, &e));
    REFUSED(pl_chat_send(chat, text("x"), NULL, (pl_cancel *)chat, NULL, NULL, &e));
    CONFIG(pl_chat_options_of(chat, NULL, &e));
    CONFIG(pl_chat_messages(chat, NULL, &e));
    pl_chat_options bad = {.size = sizeof bad};
    OK(pl_chat_options_of(chat, &bad, &e));
    bad.temperature = -1;
    CONFIG(pl_chat_set_options(chat, &bad, &e));
    bad.temperature = 0, bad.thinking = 7;
    CONFIG(pl_chat_set_options(chat, &bad, &e));
    CONFIG(pl_chat_use_adapters(chat, (const uint64_t[]){99}, 1, &e));
    expect("broken JSON", pl_chat_set_messages(chat, text("{"), &e), PL_CODE_DATA, &e);
    expect("no state", pl_chat_restore(chat, text("none"), &e), PL_CODE_FORMAT, &e);
    /* Without a place for the error. */
    if (pl_chat_restore(chat, text("none"), NULL) != PL_CODE_FORMAT) failures++;

    OK(pl_cancel_set(cancel, 1, &e));
    pl_answer answer = {.size = sizeof answer};
    OK(pl_chat_send(chat, text("x"), NULL, cancel, &answer, NULL, &e));
    if (answer.finish != 3) failures++, fprintf(stderr, "a cancelled answer ended by %u\n", answer.finish);
    pl_cancel_free(cancel);
    REFUSED(pl_cancel_set(cancel, 0, &e));

    bad.thinking = 0, bad.max_tokens = 16, bad.temperature = 1;
    OK(pl_chat_set_options(chat, &bad, &e));
    int asked = 0;
    pl_chat_listener listener = {.size = sizeof listener, .user = &asked, .on_text = ask_from_within};
    busy = chat;
    OK(pl_chat_send(chat, text("x"), &listener, NULL, NULL, NULL, &e));
    if (!asked) failures++, fprintf(stderr, "nobody heard of the answer\n");
    REFUSED(pl_chat_send(chat, text("x"), NULL, NULL, NULL, NULL, &e));
    handles(chat);

    uint64_t number = 0;
    expect("no config", pl_adapter_attach_bytes(engine, text("{"), text("x"), text("a"), 1, &number, &e), PL_CODE_FORMAT, &e);
    expect("no adapter", pl_adapter_attach(engine, text("none"), 1, &number, &e), PL_CODE_IO, &e);

    pl_trainer *trainer = NULL;
    pl_train_options lesson = {.size = sizeof lesson, .flags = PL_FIXED_SETTINGS, .out = text(argv[2])};
    expect("no data", pl_trainer_new(engine, &lesson, NULL, &trainer, &e), PL_CODE_DATA, &e);
    lesson.lines = text("{\"prompt\": \"a\", \"completion\": \"b\"}\n");
    lesson.data = text("both");
    CONFIG(pl_trainer_new(engine, &lesson, NULL, &trainer, &e));
    lesson.data = (pl_str){NULL, 0}, lesson.start = 9;
    CONFIG(pl_trainer_new(engine, &lesson, NULL, &trainer, &e));
    lesson.start = 0, lesson.settings = text("{\"rnk\": 4}");
    CONFIG(pl_trainer_new(engine, &lesson, NULL, &trainer, &e));
    lesson.settings = text("steps = 2\nkeep = \"off\"\ncheck = false"), lesson.seconds = -1;
    CONFIG(pl_trainer_new(engine, &lesson, NULL, &trainer, &e));
    lesson.seconds = 0;
    OK(pl_trainer_new(engine, &lesson, NULL, &trainer, &e));
    CONFIG(pl_trainer_order(trainer, 9, &e));
    CONFIG(pl_trainer_wait_paused(trainer, -1, (uint32_t[]){0}, &e));
    OK(pl_trainer_run(trainer, NULL, NULL, &e));

    /* Sealed, and opened with what is wrong one after the other. */
    const pl_str key = text("12345678901234567890123456789012"), other = text("22345678901234567890123456789012");
    pl_buffer *sealed = NULL;
    CONFIG(pl_adapter_seal(engine, text(argv[2]), text("short"), 1, text(""), &sealed, &e));
    OK(pl_adapter_seal(engine, text(argv[2]), key, 3, text(""), &sealed, &e));
    pl_str whole = pl_buffer_bytes(sealed), cut = {whole.data, whole.len - 1};
#define UNSEAL(bytes, key, version) pl_adapter_attach_sealed(engine, bytes, text("a"), key, version, text(""), 1, &number, &e)
    expect("another key", UNSEAL(whole, other, 0), PL_CODE_KEY, &e);
    expect("a cut seal", UNSEAL(cut, key, 0), PL_CODE_FORMAT, &e);
    expect("an older version", UNSEAL(whole, key, 4), PL_CODE_OUTDATED, &e);
    OK(UNSEAL(whole, key, 3));
    uint8_t *changed = malloc(whole.len);
    memcpy(changed, whole.data, whole.len);
    changed[whole.len / 2] ^= 1;
    expect("a changed byte", UNSEAL(((pl_str){changed, whole.len}), key, 0), PL_CODE_FORMAT, &e);
    free(changed), pl_buffer_free(sealed);
    handles(sealed);

    char other_folder[4096];
    snprintf(other_folder, sizeof other_folder, "%s-held", argv[2]);
    free_what_is_held(engine, other_folder);
    pl_engine_free(engine); /* The trainer keeps the model open. */
    handles(engine);
    pl_trainer_info after = {.size = sizeof after};
    OK(pl_trainer_info_of(trainer, &after, &e));
    pl_trainer_free(trainer);
    handles(trainer);
    if (pl_abi_version() != PL_ABI_VERSION || pl_version().len == 0) failures++;
    printf("%d failures\n", failures);
    return failures != 0;
}
