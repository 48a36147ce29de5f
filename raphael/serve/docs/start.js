// Swagger's page over this server's own description; nothing of it comes from elsewhere.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#api", deepLinking: true, validatorUrl: null, persistAuthorization: false });
