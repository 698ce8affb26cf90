/* What a model takes is told before it is opened, and holds. */
#include "pocketlora.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pl_str text(const char *chars) { return (pl_str){(const uint8_t *)chars, strlen(chars)}; }

static void must(uint32_t code, pl_error *error) {
    if (!code) return;
    fprintf(stderr, "error %u: %.*s\n", code, (int)pl_error_message(error).len, pl_error_message(error).data);
    exit(1);
}
#define OK(call) must(call, error)

static int differs(const char *what, double told, double found, double share) {
    printf("%s: told %.1f MB, found %.1f MB\n", what, told / 1e6, found / 1e6);
    return found > told * (1 + share) || found < told * (1 - share);
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    pl_error *error = NULL;
    pl_engine *engine = NULL;
    pl_chat *chat = NULL;
    pl_engine_options options = {.size = sizeof options, .context = 4096};
    pl_estimate told = {.size = sizeof told};
    pl_engine_info before = {.size = sizeof before}, open = before, after = before;
    OK(pl_model_estimate(text(argv[1]), &options, NULL, &told, &error));
    OK(pl_engine_open(text(argv[1]), &options, &engine, &error));
    OK(pl_engine_info_of(engine, &open, &error));
    int wrong = differs("opened", told.opened, open.anonymous, 0.15);
    wrong |= differs("mapped", told.mapped, open.mapped, 0.001);

    /* Some 2,000 tokens. What a long prompt takes while it is read is given back. */
    static char prompt[8000];
    for (size_t i = 0; i + 5 < sizeof prompt; i += 4) memcpy(prompt + i, " cat", 4);
    OK(pl_chat_new(engine, &chat, &error));
    pl_chat_options short_one = {.size = sizeof short_one};
    OK(pl_chat_options_of(chat, &short_one, &error));
    short_one.max_tokens = 2;
    OK(pl_chat_set_options(chat, &short_one, &error));
    pl_answer answer = {.size = sizeof answer};
    OK(pl_chat_complete(chat, text(prompt), NULL, NULL, &answer, NULL, &error));
    OK(pl_engine_info_of(engine, &after, &error));
    double tokens = (double)(answer.prompt_tokens + answer.tokens), each = (double)told.per_1000_tokens / 1000;
    /* Keys and values grow in steps of half. */
    printf("%.0f tokens: ", tokens);
    wrong |= differs("chat", tokens * each * 1.25, after.anonymous - open.anonymous, 0.35);

    /* Too little is refused before it is opened. */
    pl_engine *none = NULL;
    options.memory_budget = told.opened + told.full_chat - 1;
    if (pl_engine_open(text(argv[1]), &options, &none, &error) != PL_CODE_OUT_OF_MEMORY || none) wrong = 1;
    pl_error_free(error);
    options.memory_budget++;
    OK(pl_engine_open(text(argv[1]), &options, &none, &error));
    return wrong;
}
