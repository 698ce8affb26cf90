/* Asks a model one question and prints the answer as it comes.
 *
 *     cc chat.c -I../../ios/Sources/CPocketLora libpocketlora.a -lm -lpthread -ldl -o chat
 *     ./chat MODEL "What is the capital of France?"
 *
 * MODEL is a folder in NF4, as `pocketlora quantize` and `pl_model_import` write it. */
#include "pocketlora.h"

#include <stdio.h>
#include <string.h>

static pl_str text(const char *chars) { return (pl_str){(const uint8_t *)chars, strlen(chars)}; }

static uint32_t print(void *user, pl_str piece, uint32_t thought) {
    (void)user, (void)thought;
    fwrite(piece.data, 1, piece.len, stdout);
    return fflush(stdout) != 0; /* Anything but 0 ends the answer. */
}

static int failed(pl_error *error) {
    pl_str message = pl_error_message(error);
    fprintf(stderr, "error %u: %.*s\n", pl_error_code(error), (int)message.len, message.data);
    pl_error_free(error);
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 3) return fprintf(stderr, "usage: chat MODEL QUESTION\n"), 2;
    pl_engine *engine = NULL;
    pl_chat *chat = NULL;
    pl_error *error = NULL;
    pl_chat_listener listener = {.size = sizeof listener, .on_text = print};
    if (pl_engine_open(text(argv[1]), NULL, &engine, &error)) return failed(error);
    if (pl_chat_new(engine, &chat, &error)) return failed(error);
    if (pl_chat_send(chat, text(argv[2]), &listener, NULL, NULL, NULL, &error)) return failed(error);
    printf("\n");
    pl_chat_free(chat);
    pl_engine_free(engine);
    return 0;
}
